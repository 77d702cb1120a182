"""A tensor of a wrong shape is the same error, in the words of the op's contract, whatever would have run."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from blip3o_rt import ops
from blip3o_rt.errors import OpError
from blip3o_rt.measure.cases import cases_of
from blip3o_rt.ops.registry import Op
from blip3o_rt.ops.shapes import Shapes


def smallest_case(op: Op[Any, Any]) -> dict[str, Any]:
    """Arguments by name, of a case that has the most of those that may be absent."""
    bound = [op.bind(*case.arguments, **case.options) for case in cases_of(op.name)]
    bound = [call for call in bound if all(t.numel() for t in call if isinstance(t, Tensor))]
    given = max(sum(value is not None for value in call) for call in bound)
    fullest = [call for call in bound if sum(value is not None for value in call) == given]
    found: dict[str, Any] = min(fullest, key=lambda call: call[0].numel())._asdict()
    return found


def wrong_calls(op: Op[Any, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Calls in which one tensor has a dimension more, and which one that is."""
    arguments = smallest_case(op)
    for name in [*op.shapes.tensors, *(["out"] if "out" in arguments else [])]:
        if isinstance(arguments[name], Tensor):
            wrong = arguments[name][..., None].expand(*arguments[name].shape, 3)
            yield name, {**arguments, name: wrong}


def error_of(op: Op[Any, Any], implementation: str, arguments: dict[str, Any]) -> str:
    found = op.named(implementation)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "_find_candidates", lambda *_: (found,))
        patch.setattr(op, "_candidates", {})
        with pytest.raises(OpError) as error:
            op(**arguments)
    return str(error.value)


@pytest.mark.parametrize("op", ops.all_ops().values(), ids=str)
def test_a_wrong_shape_is_one_error_for_all_implementations(op: Op[Any, Any]) -> None:
    """Also of those that this machine cannot run: Triton's would leave the memory of a tensor."""
    for name, arguments in wrong_calls(op):
        errors = {
            implementation.name: error_of(op, implementation.name, arguments)
            for implementation in op.implementations
            if implementation.name != "cuda"
            and not (implementation.name == "cpu" and implementation.available())
        }
        assert len(set(errors.values())) == 1, (name, errors)
        (message,) = set(errors.values())
        assert message.startswith(f"{op.name}: ")
        assert " has shape [" in message
        assert "; accepted: [" in message
        assert "\n" not in message


@pytest.mark.parametrize("op", ops.all_ops().values(), ids=str)
def test_a_result_without_memory_of_its_own_has_the_shape_of_the_contract(op: Op[Any, Any]) -> None:
    if op.shapes.result is None:
        pytest.skip("written in place")
    for case in cases_of(op.name):
        call = op.bind(*case.arguments, **case.options)
        expected = op.reference(*case.arguments, **case.options).shape
        assert op.shapes.result_shape(call) == expected, case.label


def shapes(text: str, **arguments: Any) -> tuple[Shapes, Any]:
    call = namedtuple("call", arguments)(**arguments)  # type: ignore[misc]
    return Shapes.of(text, list(arguments)), call


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("x [..., D], y [D]", {"x": (2, 3, 4), "y": (5,)}, "y has shape [5]; accepted: [D = 4] (D as in x)"),
        (
            "x [..., D], y [...]",
            {"x": (2, 3, 4), "y": (2,)},
            "y has shape [2]; accepted: [... = 2 x 3] (... as in x)",
        ),
        (
            "x [..., D], y [..., 2]",
            {"x": (4,), "y": (3, 2)},
            "y has shape [3, 2]; accepted: [... = none, 2] (... as in x)",
        ),
        ("x [2 I], y [I]", {"x": (6,), "y": (4,)}, "y has shape [4]; accepted: [I = 3] (I as in x)"),
        ("x [2 I]", {"x": (5,)}, "x has shape [5]; accepted: [2 I]"),
        ("x [N], y [N + 1]", {"x": (5,), "y": (5,)}, "y has shape [5]; accepted: [N + 1 = 6] (N as in x)"),
        (
            "c [H, D], x [(Q + 2 H) D]",
            {"c": (2, 4), "x": (12,)},
            "x has shape [12]; accepted: [(Q + 2 H) D] (D, H as in c)",
        ),
        ("x [n d]", {"x": (7,), "n": 2}, "x has shape [7]; accepted: [n d]"),
        ("x []", {"x": (1,)}, "x has shape [1]; accepted: []"),
        ("x [3, D]", {"x": (2, 5)}, "x has shape [2, 5]; accepted: [3, D]"),
    ],
)
def test_what_does_not_fit_is_named(text: str, arguments: dict[str, Any], message: str) -> None:
    given = {n: torch.empty(value) if isinstance(value, tuple) else value for n, value in arguments.items()}
    found, call = shapes(text, **given)
    with pytest.raises(OpError) as error:
        found.check("op", call)
    assert str(error.value) == f"op: {message}"


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("x [..., D], y [D]", {"x": (4,), "y": (4,)}),
        ("x [..., D], y [D]", {"x": (2, 3, 4), "y": None}),
        ("x [2 I], y [I]", {"x": (0,), "y": (0,)}),
        ("c [H, D], x [(Q + 2 H) D]", {"c": (2, 4), "x": (28,)}),
        ("x [n d], y [d]", {"x": (6,), "y": (3,), "n": 2}),
    ],
)
def test_what_fits(text: str, arguments: dict[str, Any]) -> None:
    given = {n: torch.empty(value) if isinstance(value, tuple) else value for n, value in arguments.items()}
    found, call = shapes(text, **given)
    found.check("op", call)


def test_a_notation_that_cannot_be_read_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot read"):
        Shapes.of("x [D, weight [D]", ["x", "weight"])
