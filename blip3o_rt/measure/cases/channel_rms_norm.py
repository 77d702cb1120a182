"""Channels around the vector lengths, images beyond one step, with a residual, a ReLU and without."""

import math
from collections.abc import Iterator

from blip3o_rt.measure.validate.case import DTYPES, Case, random

EPS = 1e-5


def cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for channels in (1, 7, 16, 33, 128, 1030):
            x, residual = random(1, 2, 3, 4, channels, dtype=dtype), random(2, 2, 3, 4, channels, dtype=dtype)
            weight, bias = random(3, channels, dtype=dtype), random(4, channels, dtype=dtype)
            yield Case(f"{channels} channels", (x, weight, bias, EPS))
            yield Case(f"{channels} channels and a residual", (x, weight, bias, EPS), {"residual": residual})
            yield Case(f"{channels} channels and ReLU", (x, weight, bias, EPS), {"relu": True})
        x, residual = random(5, 1, 70, 70, 64, dtype=dtype), random(6, 1, 70, 70, 64, dtype=dtype)
        weight, bias = random(7, 64, dtype=dtype), random(8, 64, dtype=dtype)
        yield Case("more than one step", (x, weight, bias, EPS), {"residual": residual})
        x, residual = random(9, 5, 64, dtype=dtype), random(10, 5, 64, dtype=dtype)
        yield Case("eps shows", (3e-3 * x, weight, bias, EPS))
        yield Case("zeros", (0 * x, weight, bias, EPS))
        out = random(11, 5, 64, dtype=dtype)
        yield Case("residual and ReLU", (x, weight, bias, EPS), {"residual": residual, "relu": True})
        x[2, 7] = math.nan
        yield Case("ReLU of no number", (x, weight, bias, EPS), {"relu": True})
        x = random(12, 5, 64, dtype=dtype)
        yield Case("given out", (x, weight, bias, EPS), {"residual": residual, "out": out}, written=("out",))
