"""Calls of each op that every implementation has to get right, in a file per family of ops.

`<op>_cases()` yields the cases of an op. `<op>_check(op, case, results, exact)`, where there is one, replaces
the comparison of numbers: where near-ties let results differ without being wrong, or the contract rounds in
between. `bench` makes its inputs with the same functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from blip3o_rt.measure.cases import attention, elementwise, image, linear, norm, quantized, sampling
from blip3o_rt.measure.validate.case import Case
from blip3o_rt.measure.validate.finding import Finding, compare
from blip3o_rt.ops.registry import Op

Check = Callable[[Op[Any, Any], Case, list[Tensor], list[Tensor]], list[Finding]]
ENDING = "_cases"

_named: dict[str, Any] = {}
for _family in (attention, elementwise, image, linear, norm, quantized, sampling):
    _named |= vars(_family)


def ops_with_cases() -> set[str]:
    """Names of the ops that there are cases for."""
    return {name.removesuffix(ENDING) for name in _named if name.endswith(ENDING)}


def cases_of(op_name: str) -> Iterator[Case]:
    """The cases of an op."""
    found: Iterator[Case] = _named[op_name + ENDING]()
    return found


def check_of(op_name: str) -> Check:
    """How an op's results are compared with exact ones."""
    found: Check = _named.get(f"{op_name}_check", compare)
    return found
