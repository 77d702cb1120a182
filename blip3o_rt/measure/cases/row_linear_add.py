"""Few rows and many, whole and part tiles, in each kind of weight."""

from collections.abc import Iterator

import torch

from blip3o_rt.measure.cases.row_linear_w8 import quantized
from blip3o_rt.measure.validate.case import PRODUCTS, Case, random
from blip3o_rt.ops.dtypes import E4M3


def cases() -> Iterator[Case]:
    for dtype, weights, beside in PRODUCTS:
        for m, n, k in (
            *((m, 7, 37) for m in (1, 2, 3, 8, 9, 17, 33)),
            *((1, n, 64) for n in (1, 2, 16, 17, 130)),
            *((2, 5, k) for k in (1, 8, 16, 31)),
            (6, 33, 2048),
            (40, 12, 6144),
            (0, 4, 8),
        ):
            x, residual = random(1, m, k, dtype=dtype), random(3, m, n, dtype=dtype)
            weight = random(2, n, k, dtype=weights, scale=k**-0.5)
            label = f"{m} x {k} x {n}{beside}"
            yield Case(label, (x, weight, residual), written=(2,))
            for kind, values in (("int8", torch.int8), ("e4m3", E4M3)):
                weight, scale = quantized(2, n, k, values)
                yield Case(f"{label}, {kind}", (x, weight, residual), {"scale": scale}, written=(2,))
        x, residual = random(1, 3, 2, 50, dtype=dtype)[:, 0], random(3, 3, 2, 9, dtype=dtype)[:, 1]
        weight = random(2, 9, 60, dtype=weights, scale=0.1)[:, 10:]
        yield Case(f"rows with gaps, part of a wider weight{beside}", (x, weight, residual), written=(2,))
