"""Grids down to one pixel, channels around the vector lengths and more than one block of them."""

from collections.abc import Iterator

import torch

from blip3o_rt.measure.validate.case import DTYPES, Case, random


def case(label: str, dtype: torch.dtype, batch: int, height: int, width: int, channels: int) -> Case:
    x = random(1, batch, height, width, 2 * channels, dtype=dtype)
    input_bias, bias = (random(seed, 2 * channels, dtype=dtype) for seed in (2, 3))
    return Case(label, (x, input_bias, random(4, 2 * channels, 1, 3, 3, dtype=dtype, scale=0.5), bias))


def cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for height, width in ((1, 1), (1, 6), (5, 1), (2, 2), (7, 5), (16, 32), (33, 3)):
            yield case(f"{height} x {width}", dtype, 2, height, width, 12)
        for channels in (1, 7, 16, 33, 300, 560):
            yield case(f"{channels} channels", dtype, 1, 3, 4, channels)
        yield case("wide rows", dtype, 1, 3, 700, 40)  # fewer channels at a time fit the cache
        small = case("", dtype, 2, 3, 4, 20)
        x, *rest = small.arguments
        yield Case("far from zero", (50 * x, *rest))
        out = random(5, 2, 3, 4, 20, dtype=dtype)
        yield Case("given out", small.arguments, {"out": out}, written=("out",))
        yield Case("part of a wider tensor", (random(6, 2, 3, 4, 100, dtype=dtype)[..., 30:70], *rest))
