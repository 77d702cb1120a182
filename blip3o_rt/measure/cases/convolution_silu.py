"""Kernels of one pixel and of several, images smaller than them, channels around the vector lengths."""

from collections.abc import Iterator

from blip3o_rt.measure.validate.case import DTYPES, Case, random


def cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for side, channels, wanted in ((1, 5, 3), (3, 1, 1), (3, 7, 16), (3, 33, 40), (5, 16, 7)):
            weight = random(2, wanted, side, side, channels, dtype=dtype, scale=(side**2 * channels) ** -0.5)
            bias = random(3, wanted, dtype=dtype)
            for batch, height, width in ((1, 1, 1), (2, 4, 7)):
                x = random(1, batch, height, width, channels, dtype=dtype)
                label = f"{side} x {side}, {batch} of {height} x {width}, {channels} to {wanted} channels"
                yield Case(label, (x, weight, bias))
        x, weight = random(4, 1, 30, 40, 16, dtype=dtype), random(5, 24, 3, 3, 16, dtype=dtype)
        yield Case("far from zero", (x, weight, random(6, 24, dtype=dtype)))
