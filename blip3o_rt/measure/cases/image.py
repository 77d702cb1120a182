"""Cases of the ops on images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from blip3o_rt.measure.validate.case import DTYPES, Case, random
from blip3o_rt.measure.validate.finding import WRONG_NUMBERS, Finding
from blip3o_rt.ops.registry import Op

Size = tuple[int, int]  # height, width


def shuffle_case(label: str, dtype: torch.dtype, batch: int, side: Size, channels: int, wanted: int) -> Case:
    """x of `channels` at half of `side`, added to a result of `wanted`."""
    height, width = side
    result = random(1, batch, height, width, wanted, dtype=dtype)
    return Case(
        label, (result, random(2, batch, height // 2, width // 2, channels, dtype=dtype)), written=(0,)
    )


def unshuffle_case(
    label: str, dtype: torch.dtype, batch: int, side: Size, channels: int, wanted: int
) -> Case:
    """x of `channels` at `side`, added to a result of `wanted` at half of it."""
    height, width = side
    result = random(1, batch, height // 2, width // 2, wanted, dtype=dtype)
    return Case(label, (result, random(2, batch, height, width, channels, dtype=dtype)), written=(0,))


def convolution_case(
    label: str, dtype: torch.dtype, batch: int, side: Size, channels: int, wanted: int, kernel: int = 3
) -> Case:
    x, scale = random(1, batch, *side, channels, dtype=dtype), (kernel**2 * channels) ** -0.5
    weight = random(2, wanted, kernel, kernel, channels, dtype=dtype, scale=scale)
    return Case(label, (x, weight, random(3, wanted, dtype=dtype)))


def _shuffles(case: Callable[..., Case], channels: Sequence[tuple[int, int]]) -> Iterator[Case]:
    """Images down to one pixel, of so many channels to so many; with a bias too."""
    for dtype, (height, width), (given, wanted) in product(DTYPES, ((1, 1), (3, 5)), channels):
        label, side = f"{height} x {width}, {given} to {wanted} channels", (2 * height, 2 * width)
        yield (plain := case(label, dtype, 2, side, given, wanted))
        yield replace(plain, label=f"{label}, bias", options={"bias": random(3, wanted, dtype=dtype)})


def add_pixel_shuffle_cases() -> Iterator[Case]:
    """As many channels as before, half, twice, a quarter."""
    return _shuffles(shuffle_case, ((1, 1), (4, 1), (4, 3), (12, 6), (7, 7), (16, 32), (300, 150)))


def add_pixel_unshuffle_cases() -> Iterator[Case]:
    """As many channels as before, twice, half, four times."""
    return _shuffles(unshuffle_case, ((1, 1), (1, 4), (3, 4), (6, 12), (7, 7), (32, 16), (150, 300)))


def convolution_silu_cases() -> Iterator[Case]:
    """Kernels of one pixel and of several, images smaller than them, channels around the vector lengths."""
    for dtype in DTYPES:
        for side, channels, wanted in ((1, 5, 3), (3, 1, 1), (3, 7, 16), (3, 33, 40), (5, 16, 7)):
            for batch, height, width in ((1, 1, 1), (2, 4, 7)):
                label = f"{side} x {side}, {batch} of {height} x {width}, {channels} to {wanted} channels"
                yield convolution_case(label, dtype, batch, (height, width), channels, wanted, side)
        x, weight = random(4, 1, 30, 40, 16, dtype=dtype), random(5, 24, 3, 3, 16, dtype=dtype)
        yield Case("far from zero", (x, weight, random(6, 24, dtype=dtype)))


def separable_case(
    label: str, dtype: torch.dtype, batch: int, side: Size, channels: int, group: int, kernel: int = 5
) -> Case:
    x, depth = (
        random(1, batch, *side, channels, dtype=dtype),
        random(2, channels, kernel, kernel, 1, dtype=dtype),
    )
    return Case(label, (x, depth / kernel, random(3, channels, 1, 1, group, dtype=dtype, scale=group**-0.5)))


def separable_convolution_cases() -> Iterator[Case]:
    """Kernels larger than the image, pixels around a tile's, one group and several."""
    kernels, sides = ((1, 16, 16), (3, 48, 16), (5, 64, 32), (7, 64, 64)), ((1, 1), (3, 7), (8, 8), (5, 13))
    for dtype, (kernel, channels, group), side in product(DTYPES, kernels, sides):
        label = f"{kernel} x {kernel}, {side[0]} x {side[1]}, {channels} channels by {group}"
        yield separable_case(label, dtype, 2 if side == (3, 7) else 1, side, channels, group, kernel)


def glu_case(label: str, dtype: torch.dtype, batch: int, height: int, width: int, channels: int) -> Case:
    x = random(1, batch, height, width, 2 * channels, dtype=dtype)
    input_bias, bias = (random(seed, 2 * channels, dtype=dtype) for seed in (2, 3))
    return Case(label, (x, input_bias, random(4, 2 * channels, 1, 3, 3, dtype=dtype, scale=0.5), bias))


def depthwise_glu_cases() -> Iterator[Case]:
    """Grids down to one pixel, channels around the vector lengths and more than one block of them."""
    for dtype in DTYPES:
        for height, width in ((1, 1), (1, 6), (5, 1), (2, 2), (7, 5), (16, 32), (33, 3)):
            yield glu_case(f"{height} x {width}", dtype, 2, height, width, 12)
        for channels in (1, 7, 16, 33, 300, 560):
            yield glu_case(f"{channels} channels", dtype, 1, 3, 4, channels)
        yield glu_case("wide rows", dtype, 1, 3, 700, 40)  # fewer channels at a time fit the cache
        small = glu_case("", dtype, 2, 3, 4, 20)
        x, *rest = small.arguments
        yield Case("far from zero", (50 * x, *rest))
        out = random(5, 2, 3, 4, 20, dtype=dtype)
        yield Case("given out", small.arguments, {"out": out}, written=("out",))
        yield Case("part of a wider tensor", (random(6, 2, 3, 4, 100, dtype=dtype)[..., 30:70], *rest))


def codebook(count: int, width: int) -> Tensor:
    return F.normalize(random(2, count, width), dim=1)


def nearest_code_cases() -> Iterator[Case]:
    """Every remainder of the tiles, several panels of codes, and codes that occur twice."""
    for rows, codes, width in (
        *((rows, 21, 19) for rows in (1, 2, 3, 4, 5, 9)),
        *((3, codes, 16) for codes in (1, 2, 3, 4, 5, 400)),
        *((3, 21, width) for width in (1, 2, 15, 17, 33)),
        (70, 130, 1536),
        (0, 5, 8),
    ):
        label = f"{rows} rows, {codes} codes of {width}"
        yield Case(label, (random(1, rows, width), codebook(codes, width)))
    twice = codebook(60, 24).repeat(3, 1)
    yield Case("codes that occur three times", (random(1, 40, 24), twice))
    yield Case(
        "long and short features", (random(1, 4, 24) * torch.tensor([[1e-12], [1e12], [0.0], [1]]), twice)
    )


def nearest_code_check(
    op: Op[Any, Any], case: Case, results: list[Tensor], exact: list[Tensor]
) -> list[Finding]:
    """The chosen code's score is the largest up to the tolerance; of equal codes it is the first."""
    features, codes = (a.double() for a in case.arguments)
    chosen, expected = results[0], exact[0]
    if chosen.shape != expected.shape or bool(((chosen < 0) | (chosen >= len(codes))).any()):
        return [Finding(WRONG_NUMBERS, float("nan"), 0.0, detail="not one code of the codebook per row")]
    score, best = ((features * codes[index]).sum(dim=1) for index in (chosen, expected))
    shortfall = (best - score) / features.norm(dim=1).clamp(min=torch.finfo(torch.float64).tiny)
    first_equal = (codes[chosen][:, None] == codes[None]).all(dim=-1).int().argmax(dim=1)
    return [
        Finding("score shortfall", max([0.0, *shortfall.tolist()]), op.tolerance[torch.float32]),
        Finding("later of equal codes", float((chosen != first_equal).sum()), 0.0),
    ]
