"""Cases of the elementwise ops."""

from __future__ import annotations

from collections.abc import Iterator

from blip3o_rt.measure.validate.case import DTYPES, Case, random


def silu_mul_cases() -> Iterator[Case]:
    """Odd widths, and gates so large that the exponential ends at 0 or at infinity."""
    for dtype in DTYPES:
        for rows, width in ((1, 1), (2, 5), (3, 16), (1, 100), (5, 1024), (0, 8)):
            yield Case(f"{rows} x {width}", (random(1, rows, 2 * width, dtype=dtype),))
        yield Case("gates to +-300", (random(2, 4, 2 * 64, dtype=dtype, scale=100.0),))
        out = random(3, 2, 24, dtype=dtype)
        yield Case("given out", (random(4, 2, 48, dtype=dtype),), {"out": out}, written=("out",))


def gated_add_cases() -> Iterator[Case]:
    """Widths around the vector lengths, gates in both dtypes, parts of larger tensors."""
    for dtype in DTYPES:
        for width in (1, 7, 16, 33, 1030):
            residual, x = random(1, 2, 3, width, dtype=dtype), random(2, 2, 3, width, dtype=dtype)
            yield Case(f"width {width}", (residual, x, random(3, width)), written=(0,))
        gate = random(3, 40, dtype=dtype)
        residual, x = random(1, 2, 300, 40, dtype=dtype), random(2, 2, 300, 40, dtype=dtype)
        yield Case("gate in the dtype of the rows", (residual, x, gate), written=(0,))
        yield Case("zero gate", (residual, x, 0 * gate), written=(0,))
        yield Case("one half of two", (residual[1:], x[1:], gate), written=(0,))
        gaps = random(4, 3, 80, dtype=dtype)[:, :40]
        yield Case("rows with gaps", (gaps, random(5, 3, 40, dtype=dtype), gate), written=(0,))
