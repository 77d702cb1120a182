"""Cases of products."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from blip3o_rt.measure.cases.quantized import quantized
from blip3o_rt.measure.validate.case import PRODUCTS, Case, random
from blip3o_rt.ops.dtypes import E4M3

EPS = 1e-6


def product_case(
    label: str,
    dtype: torch.dtype,
    m: int,
    n: int,
    k: int,
    weights: torch.dtype | None = None,
    **options: Tensor,
) -> Case:
    """x [m, k] times a weight [n, k] of dtype `weights`, or that of x; `out` is written where it is given."""
    weight = random(2, n, k, dtype=weights or dtype, scale=k**-0.5)
    return Case(label, (random(1, m, k, dtype=dtype), weight), options, ("out",) if "out" in options else ())


def add_case(
    label: str, dtype: torch.dtype, m: int, n: int, k: int, weights: torch.dtype | None = None
) -> Case:
    """x [m, k] times a weight [n, k], added to a residual."""
    product = product_case(label, dtype, m, n, k, weights)
    return Case(label, (*product.arguments, random(3, m, n, dtype=dtype)), written=(2,))


def norm_case(
    label: str, dtype: torch.dtype, m: int, n: int, k: int, weights: torch.dtype | None = None, *, gated: bool
) -> Case:
    """x [m, k], normed, times a weight [n, k]."""
    x, weight = product_case(label, dtype, m, n, k, weights).arguments
    return Case(label, (x, 1 + random(3, k, dtype=dtype, scale=0.3), EPS, weight), {"gated": gated})


def linear_cases() -> Iterator[Case]:
    """Every number of rows in a tile, and outputs and inputs around multiples of a panel and of a vector."""
    for dtype, weights, beside in PRODUCTS:
        for m, n, k in (
            *((m, 50, 38) for m in (*range(1, 10), 17, 40)),
            *((9, n, 64) for n in (1, 15, 16, 17, 31, 32, 33, 47, 48, 49, 200)),
            *((9, 20, k) for k in (1, 2, 3, 30, 31, 32, 34, 62, 64, 66, 190)),
            (11, 60, 6144),
            (70, 300, 96),
            (700, 17, 6144),  # more than a slice
            (0, 4, 8),
        ):
            yield product_case(f"{m} x {k} x {n}{beside}", dtype, m, n, k, weights)
        weight, bias = random(2, 90, 150, dtype=weights, scale=150**-0.5), random(3, 90, dtype=dtype)
        x = random(1, 12, 150, dtype=dtype)
        yield Case(f"bias{beside}", (x, weight, bias))
        yield Case(f"leading dimensions{beside}", (x.view(2, 3, 2, 150), weight, bias))
        yield Case(f"rows with gaps{beside}", (random(4, 12, 2, 150, dtype=dtype)[:, 0], weight))
        yield Case(
            f"columns one by one in memory{beside}", (random(6, 150, 12, dtype=dtype).t(), weight, bias)
        )
        yield Case(
            f"part of a wider weight{beside}", (random(5, 12, 70, dtype=dtype), weight[:, 10:80], bias)
        )
        yield Case(f"one large activation{beside}", (x.index_fill(1, torch.tensor([3]), 3e3), weight, bias))
        out = torch.zeros(12, 90, dtype=dtype)
        yield Case(f"given out{beside}", (x, weight, bias), {"out": out}, written=("out",))
        wide = torch.zeros(12, 100, dtype=dtype)
        yield Case(
            f"columns of a wider out{beside}", (x, weight, bias), {"out": wide[:, 5:95]}, written=("out",)
        )


def gated_case(
    label: str,
    dtype: torch.dtype,
    m: int,
    n: int,
    k: int,
    weights: torch.dtype | None = None,
    bias: bool = True,
) -> Case:
    """x [m, k] times a weight [n, k], added to a residual through a gate."""
    product = product_case(label, dtype, m, n, k, weights)
    others = (random(3, m, n, dtype=dtype), random(4, n), *([random(5, n, dtype=dtype)] if bias else []))
    return Case(label, (*product.arguments, *others), written=(2,))


def linear_gated_add_cases() -> Iterator[Case]:
    """Rows, outputs and inputs around tiles, gates in both dtypes, parts of larger tensors."""
    for dtype, weights, beside in PRODUCTS:
        for m, n, k in (
            *((m, 50, 38) for m in (1, 3, 9, 40)),
            *((9, n, 64) for n in (1, 15, 33, 200)),
            *((9, 20, k) for k in (2, 30, 66, 190)),
            (140, 150, 96),
            (0, 4, 8),
        ):
            yield gated_case(f"{m} x {k} x {n}{beside}", dtype, m, n, k, weights)
        yield gated_case(f"without a bias{beside}", dtype, 12, 90, 150, weights, bias=False)
        x, weight, residual, gate, bias = gated_case("", dtype, 12, 90, 150, weights).arguments
        narrow = Case(
            f"gate in the dtype of x{beside}", (x, weight, residual, gate.to(dtype), bias), {}, (2,)
        )
        yield narrow
        yield replace(narrow, label=f"given memory{beside}", options={"product": torch.zeros_like(residual)})
        rows = x.view(2, 6, 150), weight, residual.view(2, 6, 90), gate, bias
        yield Case(f"leading dimensions{beside}", rows, {}, (2,))
        gaps = random(6, 12, 2, 90, dtype=dtype)[:, 1]
        yield Case(f"rows with gaps{beside}", (x, weight, gaps, gate, bias), {}, (2,))
        yield Case(f"zero gate{beside}", (x, weight, residual, 0 * gate, bias), {}, (2,))


def row_linear_cases() -> Iterator[Case]:
    """Every remainder of the tiles: rows, outputs and inputs around multiples of 4 and of the vectors."""
    for dtype, weights, beside in PRODUCTS:
        for m, n, k in (
            *((m, 7, 37) for m in (1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 33)),
            *((1, n, 64) for n in (1, 2, 3, 4, 5, 130)),
            *((2, 5, k) for k in (1, 3, 4, 8, 15, 16, 17, 31, 32, 33)),
            (1, 300, 1024),
            (6, 33, 2048),
            (40, 12, 6144),
            (64, 40, 264),
            (65, 40, 264),
            (2, 4400, 192),
            (0, 4, 8),
        ):
            yield product_case(f"{m} x {k} x {n}{beside}", dtype, m, n, k, weights)
        weight, bias, out = random(2, 9, 50, dtype=weights), random(3, 9, dtype=dtype), torch.zeros(3, 9)
        pair, options = (random(1, 3, 50, dtype=dtype), weight), {"bias": bias, "out": out}
        yield Case(f"bias{beside}", pair, {"bias": bias})
        yield Case(f"float32 out{beside}", pair, options, written=("out",))
        yield Case(f"rows with gaps{beside}", (random(4, 3, 2, 50, dtype=dtype)[:, 0], weight))
        yield Case(f"part of a wider weight{beside}", (random(5, 2, 20, dtype=dtype), weight[:, 10:30]))
        pair, out = (random(1, 2, 8, dtype=dtype), random(2, 4099, 8, dtype=weights)), torch.zeros(2, 4099)
        yield Case(f"more rows than are widened at once{beside}", pair, {"out": out})


def row_linear_add_cases() -> Iterator[Case]:
    """Few rows and many, whole and part tiles, in each kind of weight."""
    for dtype, weights, beside in PRODUCTS:
        for m, n, k in (
            *((m, 7, 37) for m in (1, 2, 3, 8, 9, 17, 33)),
            *((1, n, 64) for n in (1, 2, 16, 17, 130)),
            *((2, 5, k) for k in (1, 8, 16, 31)),
            (6, 33, 2048),
            (40, 12, 6144),
            (0, 4, 8),
        ):
            label = f"{m} x {k} x {n}{beside}"
            yield (plain := add_case(label, dtype, m, n, k, weights))
            x, _, residual = plain.arguments
            for kind, values in (("int8", torch.int8), ("e4m3", E4M3)):
                weight, scale = quantized(2, n, k, values)
                yield Case(f"{label}, {kind}", (x, weight, residual), {"scale": scale}, written=(2,))
        x, residual = random(1, 3, 2, 50, dtype=dtype)[:, 0], random(3, 3, 2, 9, dtype=dtype)[:, 1]
        weight = random(2, 9, 60, dtype=weights, scale=0.1)[:, 10:]
        yield Case(f"rows with gaps, part of a wider weight{beside}", (x, weight, residual), written=(2,))


def norm_row_linear_cases() -> Iterator[Case]:
    """Few rows and many, whole and part tiles, gated or not, in each kind of weight."""
    for dtype, weights, beside in PRODUCTS:
        for m, n, k in (
            *((m, 14, 37) for m in (1, 2, 3, 8, 9)),
            *((1, n, 64) for n in (2, 4, 16, 18, 130)),
            *((2, 6, k) for k in (1, 3, 8, 15, 16, 24, 33)),
            (5, 34, 2048),
            (1, 300, 1024),
            (17, 24, 264),
            (3, 10, 6144),
            (0, 4, 8),
        ):
            for gated in (False, True):
                label = f"{m} x {k} x {n}{', gated' if gated else ''}{beside}"
                yield (plain := norm_case(label, dtype, m, n, k, weights, gated=gated))
                x, norm_weight, *_ = plain.arguments
                for kind, values in (("int8", torch.int8), ("e4m3", E4M3)):
                    weight, scale = quantized(2, n, k, values)
                    options = {"gated": gated, "scale": scale}
                    yield Case(f"{label}, {kind}", (x, norm_weight, EPS, weight), options)
        x, norm_weight = random(1, 3, 2, 50, dtype=dtype)[:, 0], random(3, 50, dtype=dtype)
        weight = random(2, 9, 60, dtype=weights, scale=0.1)
        yield Case(f"rows with gaps, part of a wider weight{beside}", (x, norm_weight, EPS, weight[:, 10:]))
        x, weight = random(1, 2, 48, dtype=dtype, scale=1e-3), weight[:8, :48].contiguous()
        yield Case(
            f"large eps, given out{beside}",
            (x, norm_weight[:48], 1e-2, weight),
            {"out": torch.zeros(2, 8, dtype=dtype)},
        )
        gates = 30 * weight
        yield Case(f"gates to +-100{beside}", (1e3 * x, norm_weight[:48], EPS, gates), {"gated": True})
