"""How an implementation is chosen, forced, refused and reported."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from blip3o_rt import ops
from blip3o_rt.errors import OpError
from blip3o_rt.ops import registry


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Iterator[registry.Op]:
    """An op whose implementations add up to what was run: reference 2 x, picky 20 x, absent never."""
    monkeypatch.setattr(registry, "_ops", dict(registry._ops))

    @registry.op(tolerance={torch.float32: 0.0})
    def double(x: Tensor, *, times: float = 2.0) -> Tensor:
        """times x."""
        return x * times

    @double.implementation("absent", available=lambda: "it is not built; build it")
    def _(x: Tensor, *, times: float = 2.0) -> Tensor:
        raise AssertionError

    def small(x: Tensor, *, times: float = 2.0) -> str | None:
        return None if x.numel() < 3 else "takes at most 2 numbers"

    @double.implementation("picky", device="cpu", dtypes=(torch.float32,), supports=small)
    def _(x: Tensor, *, times: float = 2.0) -> Tensor:
        return x * times * 10

    return double


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    monkeypatch.setattr(registry, "_environment_read", False)
    yield monkeypatch
    for op in registry.all_ops().values():
        op.force(None)


def test_first_that_supports_the_call(double: registry.Op) -> None:
    assert double(torch.ones(2)).tolist() == [20, 20]
    assert double(torch.ones(2), times=3).tolist() == [30, 30]
    assert double(torch.ones(3)).tolist() == [2, 2, 2]
    assert double(torch.ones(1, dtype=torch.float64)).tolist() == [2]
    assert double.__doc__ == "times x."


def test_used_names_what_ran(double: registry.Op) -> None:
    ops.reset_used()
    double(torch.ones(2))
    assert ops.used() == {"double": ("picky",)}
    double(torch.ones(3))
    assert ops.used() == {"double": ("picky", "torch")}
    ops.reset_used()
    assert ops.used() == {}


def test_force(double: registry.Op) -> None:
    with ops.force("double", "torch"):
        assert double(torch.ones(2)).tolist() == [2, 2]
    assert double(torch.ones(2)).tolist() == [20, 20]


@pytest.mark.parametrize(
    ("implementation", "x", "reason"),
    [
        ("absent", torch.ones(1), "it is not built; build it"),
        ("picky", torch.ones(3), "takes at most 2 numbers"),
        ("picky", torch.ones(1, dtype=torch.float64), "takes float32, got float64"),
        ("picky", torch.ones(1, device="meta"), "takes tensors on cpu, got meta"),
    ],
)
def test_forced_choice_never_falls_back(
    double: registry.Op, implementation: str, x: Tensor, reason: str
) -> None:
    with ops.force("double", implementation), pytest.raises(OpError) as error:
        double(x)
    message = str(error.value)
    assert "\n" not in message
    for part in ("double", f"'{implementation}'", reason, "BLIP3O_OPS", "'torch'"):
        assert part in message


def test_unknown_names_list_the_known() -> None:
    with (
        pytest.raises(OpError, match=r"no op 'rmsnorm'.*rms_norm, row_linear"),
        ops.force("rmsnorm", "torch"),
    ):
        pass
    with (
        pytest.raises(OpError, match=r"rms_norm has no .*'gpu'; it has: .*torch"),
        ops.force("rms_norm", "gpu"),
    ):
        pass


def test_choices_say_why(double: registry.Op) -> None:
    lines = {c.implementation: c for c in double.choices("cpu", torch.float32)}
    assert lines["absent"].reason == "it is not built; build it"
    assert lines["picky"].chosen
    assert lines["torch"].reason == "'picky' comes first"
    with ops.force("double", "torch"):
        lines = {c.implementation: c for c in ops.choices("cpu", torch.float32) if c.op == "double"}
        assert lines["torch"].chosen
        assert lines["picky"].reason == "'torch' is forced"


def test_every_op_has_one_choice() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        chosen = [choice.op for choice in ops.choices("cpu", dtype) if choice.chosen]
        assert chosen == sorted(ops.all_ops())


def test_environment_forces(double: registry.Op, environment: pytest.MonkeyPatch) -> None:
    environment.setenv("BLIP3O_OPS", " double=torch , rms_norm = torch ,")
    assert double(torch.ones(2)).tolist() == [2, 2]
    chosen = {c.op: c.implementation for c in ops.choices("cpu", torch.float32) if c.chosen}
    assert chosen["rms_norm"] == "torch"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("nonsense", "'nonsense' is not of the form op=implementation"),
        ("tripple=torch", "there is no op 'tripple'; the ops are: .*double"),
        ("double=gpu", "op double has no implementation 'gpu'; it has: absent, picky, torch"),
    ],
)
def test_environment_with_a_wrong_name(
    double: registry.Op, environment: pytest.MonkeyPatch, setting: str, message: str
) -> None:
    environment.setenv("BLIP3O_OPS", setting)
    for _ in range(2):  # it keeps saying so
        with pytest.raises(OpError, match=message):
            double(torch.ones(2))
