"""Widths around the vector lengths, rows with gaps between them, each combination of bias and residual."""

from collections.abc import Iterator

from blip3o_rt.validate.case import DTYPES, Case, random

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
