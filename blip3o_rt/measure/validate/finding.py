"""How far a result of an op is from the reference in float64, and how far it may be."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blip3o_rt.measure.validate.case import Case
from blip3o_rt.ops.registry import Op

WORST_ERROR = "worst error"
WRONG_NUMBERS = "wrong numbers"


@dataclass(frozen=True)
class Finding:
    """One comparison of one output: what was measured, the figure found, and the largest one accepted.

    A figure that is not a number does not pass. output: "result", or the argument that was written.
    """

    measure: str
    found: float
    bound: float
    output: str = "result"
    detail: str = ""

    @property
    def passed(self) -> bool:
        return self.found <= self.bound


def compare(op: Op[Any, Any], case: Case, results: list[Tensor], exact: list[Tensor]) -> list[Finding]:
    """Every output of a call with the reference's: integers are equal, floating numbers within tolerance."""
    names = ["result", *(str(written) for written in case.written)]
    return [
        compare_output(op, result, expected, name)
        for name, result, expected in zip(names, results, exact, strict=True)
    ]


def compare_output(op: Op[Any, Any], result: Tensor, exact: Tensor, output: str = "result") -> Finding:
    """One output, by the measure of its dtype."""
    floating = exact.is_floating_point()
    measure, bound = (WORST_ERROR, op.tolerance.get(result.dtype, 0.0)) if floating else (WRONG_NUMBERS, 0.0)
    if result.shape != exact.shape:
        detail = f"shape {list(result.shape)}, not {list(exact.shape)}"
        return Finding(measure, float("nan"), bound, output, detail)
    if result.is_floating_point() != floating:
        return Finding(measure, float("nan"), bound, output, f"dtype {result.dtype}")
    if floating:
        return Finding(measure, worst_error(result, exact), bound, output)
    return Finding(measure, float((result != exact).sum()), bound, output)


def worst_error(result: Tensor, exact: Tensor) -> float:
    """max (|result - exact| - half a unit in the last place) / (|exact| + rms(exact)), and at least 0.

    What is left of a result's error when the rounding to its own dtype is taken off: the error of the
    arithmetic inside, which is the same for a bfloat16 result as for a float32 one. A result that was
    truncated, or rounded twice, shows. Where exact is not a number the result must not be one either, and
    nowhere else.
    """
    no_number = exact.isnan()
    if not torch.equal(result.isnan(), no_number):  # one that was lost on the way, or made there
        return math.nan
    result, exact = result[~no_number], exact[~no_number]
    if exact.numel() == 0:
        return 0.0
    exact = exact.double()
    difference = (result.double() - exact).abs()
    beyond = (difference - half_unit(exact, result.dtype)).clamp(min=0)
    scale = exact.abs() + exact.square().mean().sqrt()
    return float(torch.where(result.double() == exact, 0.0, beyond / scale).max())


def half_unit(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Half a unit in the last place of each number in `dtype`: the most that rounding to nearest is off."""
    numbers = torch.finfo(dtype)
    _, exponent = torch.frexp(exact)  # |exact| is in 2^(exponent - 1) .. 2^exponent
    unit = torch.ldexp(torch.full_like(exact, numbers.eps / 4), exponent)
    return unit.clamp(min=numbers.smallest_normal * numbers.eps / 2)
