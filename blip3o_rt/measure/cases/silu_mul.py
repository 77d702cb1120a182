"""Odd widths, and gates so large that the exponential ends at 0 or at infinity."""

from collections.abc import Iterator

from blip3o_rt.measure.validate.case import DTYPES, Case, random


def cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for rows, width in ((1, 1), (2, 5), (3, 16), (1, 100), (5, 1024), (0, 8)):
            yield Case(f"{rows} x {width}", (random(1, rows, 2 * width, dtype=dtype),))
        yield Case("gates to +-300", (random(2, 4, 2 * 64, dtype=dtype, scale=100.0),))
        out = random(3, 2, 24, dtype=dtype)
        yield Case("given out", (random(4, 2, 48, dtype=dtype),), {"out": out}, written=("out",))
