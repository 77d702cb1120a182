"""Few rows and many, whole and part tiles, gated or not, in each kind of weight."""

from collections.abc import Iterator

import torch

from blip3o_rt.measure.cases.row_linear_w8 import quantized
from blip3o_rt.measure.validate.case import PRODUCTS, Case, random
from blip3o_rt.ops.dtypes import E4M3

EPS = 1e-6


def cases() -> Iterator[Case]:
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
            x, norm_weight = random(1, m, k, dtype=dtype), 1 + random(3, k, dtype=dtype, scale=0.3)
            for gated in (False, True):
                label = f"{m} x {k} x {n}{', gated' if gated else ''}{beside}"
                weight = random(2, n, k, dtype=weights, scale=k**-0.5)
                yield Case(label, (x, norm_weight, EPS, weight), {"gated": gated})
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
