"""How an implementation is chosen, forced, refused and reported."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from blip3o_rt import ops
from blip3o_rt.errors import OpError
from blip3o_rt.ops import registry


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> registry.Op[Any, Any]:
    """An op whose implementations add up to what was run: reference 2 x, picky 20 x, absent never."""
    monkeypatch.setattr(registry, "_ops", dict(registry._ops))

    @registry.op(tolerance={torch.float32: 0.0})
    def double(x: Tensor, *, times: float = 2.0) -> Tensor:
        """times x."""
        return x * times

    @double.implementation("absent", available=lambda: "it is not built; build it")
    def _(x: Tensor, *, times: float = 2.0) -> Tensor:
        raise AssertionError

    def small(call: Any) -> str | None:
        return None if call.x.numel() < 3 else "takes at most 2 numbers"

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


def test_a_recording_names_what_ran(double: registry.Op) -> None:
    double(torch.ones(2))
    with ops.recording_usage() as used:
        assert used == {}
        double(torch.ones(2))
        assert used == {"double": {"picky"}}
        with ops.recording_usage() as inner:
            double(torch.ones(3))
        assert inner == {"double": {"torch"}}
    assert used == {"double": {"picky", "torch"}}
    double(torch.ones(3))
    with pytest.warns(DeprecationWarning, match="recording_usage"):
        assert ops.used() == {"double": ("picky", "torch")}


def test_recordings_of_two_threads_do_not_mix(double: registry.Op) -> None:
    both_record = threading.Barrier(2)

    def record(numbers: int) -> registry.Usage:
        with ops.recording_usage() as used:
            both_record.wait(timeout=60)
            double(torch.ones(numbers))
            both_record.wait(timeout=60)
        return used

    with ThreadPoolExecutor(2) as threads:
        small, large = threads.map(record, (2, 3))
    assert (small, large) == ({"double": {"picky"}}, {"double": {"torch"}})


def test_force(double: registry.Op) -> None:
    with ops.force("double", "torch"):
        assert double(torch.ones(2)).tolist() == [2, 2]
    assert double(torch.ones(2)).tolist() == [20, 20]


def test_forcing_blocks_of_two_threads_may_overlap(double: registry.Op) -> None:
    first, second = ops.force("double", "torch"), ops.force("double", "picky")
    first.__enter__()
    assert double(torch.ones(2)).tolist() == [2, 2]
    second.__enter__()
    assert double(torch.ones(2)).tolist() == [20, 20]
    first.__exit__(None, None, None)
    with pytest.raises(OpError, match="forced to 'picky'"):
        double(torch.ones(3))
    second.__exit__(None, None, None)
    assert double(torch.ones(3)).tolist() == [2, 2, 2]


def test_a_look_up_begun_before_a_force_is_forgotten(double: registry.Op) -> None:
    """As where another thread forces an op while this one finds its candidates."""
    forced = ops.force("double", "torch")

    def available() -> None:
        forced.__enter__()

    double.withdraw("picky")

    @double.implementation("picky", device="cpu", available=available)
    def _(x: torch.Tensor, *, times: float = 2.0) -> torch.Tensor:
        return x * times * 10

    assert double(torch.ones(2)).tolist() == [20, 20]
    assert double(torch.ones(2)).tolist() == [2, 2]
    forced.__exit__(None, None, None)


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
        pytest.raises(OpError, match=r"no op 'rmsnorm'.*rms_norm, .*row_linear"),
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


def test_what_runs_on_request_is_chosen_by_name_alone(double: registry.Op) -> None:
    @double.implementation("slow", on_request=True)
    def _(x: Tensor, *, times: float = 2.0) -> Tensor:
        return x * 3

    double.prefer("slow")
    x = torch.ones(1)
    assert double(x).tolist() == [20.0]
    with ops.force("double", "slow"):
        assert double(x).tolist() == [3.0]
    lines = {c.implementation: c for c in double.choices("cpu", torch.float32)}
    assert lines["slow"].reason == "runs on request: BLIP3O_OPS=double=slow"
    assert lines["picky"].chosen


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
