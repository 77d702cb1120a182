"""The bounds of a stage's results, and the lines that hold results against them.

float32: 1e-5 relative L2 from the published modules in float32. Those are within 1e-6 of float64 on small
models, sums in another order are as far away again, and a formula that is wrong is off by 1e-3 or more.
bfloat16: 1.25 times as far from the published modules in float32 as the published modules in bfloat16 are.
The same rounding in other places, and in fewer of them, is 0.6 to 1.0 times as far on random models; kernels
that truncate are 1.1 to 1.4 times. From prompt to image, where one stage's error goes through the next,
1.5 times.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from blip3o_rt.measure.baselines.measure import relative_l2
from blip3o_rt.measure.validate.line import Line, at_most

FP32_BOUND = 1e-5
BF16_RATIO = 1.25
PIPELINE_RATIO = 1.5
WHY_FP32 = "float32 rounding and sums in another order; a wrong formula is off by 1e-3"


def tensor_line(
    group: str,
    name: str,
    dtype: str,
    found: Tensor,
    exact: Tensor,
    published: Tensor | None,
    *,
    ratio: float = BF16_RATIO,
    **rest: Any,
) -> Line:
    """Our result against the published one in float32.

    published: the published one in bfloat16, whose error times `ratio` is the bound of a "bf16" line. rest:
    more fields of the line.
    """
    error = _error(found, exact)
    if dtype == "fp32" or published is None:
        return at_most(group, name, dtype, "relative L2", error, FP32_BOUND, why=WHY_FP32, **rest)
    known, why = _error(published, exact), why_bf16(ratio)
    return at_most(
        group, name, dtype, "relative L2", error, ratio * known, why=why, reference_error=known, **rest
    )


def why_bf16(ratio: float = BF16_RATIO) -> str:
    """What the bound of a "bf16" line is."""
    return f"{ratio:g} x the published modules' own bfloat16 error"


def equal_line(group: str, name: str, dtype: str, found: Tensor, expected: Tensor, **rest: Any) -> Line:
    """Integers or bits that must be the same; found is how many differ."""
    found, expected = found.cpu(), expected.cpu()
    if found.shape != expected.shape:
        rest["detail"] = f"shape {list(found.shape)}, not {list(expected.shape)}"
        return at_most(group, name, dtype, "values that differ", float("nan"), 0.0, **rest)
    differing = float((found != expected).sum())
    return at_most(group, name, dtype, "values that differ", differing, 0.0, **rest)


def _error(found: Tensor, exact: Tensor) -> float:
    """Relative L2; not a number for another shape, which passes no bound."""
    return relative_l2(found.cpu(), exact.cpu()) if found.shape == exact.shape else float("nan")
