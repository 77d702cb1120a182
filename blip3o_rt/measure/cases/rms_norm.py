"""Widths around the vector lengths, rows with gaps between them, each combination of bias and residual."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from blip3o_rt.measure.validate.case import DTYPES, Case, copies, random
from blip3o_rt.measure.validate.finding import Finding, compare, compare_output
from blip3o_rt.ops.registry import Op

EPS = 1e-6


def cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for width in (1, 7, 16, 33, 128, 1030):
            x, weight = random(1, 3, width, dtype=dtype), random(2, width, dtype=dtype)
            yield Case(f"width {width}", (x, weight, EPS))
            yield Case(
                f"width {width}, residual, bias",
                (x, weight, EPS),
                {"bias": random(3, width, dtype=dtype), "residual": random(4, 3, width, dtype=dtype)},
                written=("residual",),
            )
        weight = random(2, 40, dtype=dtype)
        yield Case("one row of one dimension", (random(5, 40, dtype=dtype), weight, EPS))
        yield Case("no rows", (random(5, 0, 40, dtype=dtype), weight, EPS))
        yield Case("rows with gaps", (random(6, 5, 2, 40, dtype=dtype)[:, 1], weight, EPS))
        yield Case("many rows, three dimensions", (random(7, 2, 300, 40, dtype=dtype), weight, EPS))
        yield Case("large eps", (random(8, 2, 40, dtype=dtype, scale=1e-3), weight, 1e-2))
        out = random(9, 2, 40, dtype=dtype)
        yield Case("given out", (random(8, 2, 40, dtype=dtype), weight, EPS), {"out": out}, written=("out",))


def check(op: Op[Any, Any], case: Case, results: list[Tensor], exact: list[Tensor]) -> list[Finding]:
    """The updated residual is rounded before it is normed, so the norm is compared with that of what was
    written."""
    if "residual" not in case.written or results[1].shape != exact[1].shape:
        return compare(op, case, results, exact)
    (_, weight, eps), options = copies(case, widen=True)
    normed = op.reference(results[1].double(), weight, eps, bias=options.get("bias"))
    return [
        compare_output(op, results[0], normed),
        compare_output(op, results[1], exact[1], "residual"),
    ]
