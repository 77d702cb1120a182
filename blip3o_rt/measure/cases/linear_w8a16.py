"""Every number of rows in a tile, and outputs and inputs around multiples of a panel and of a vector."""

from collections.abc import Iterator

import torch

from blip3o_rt.measure.cases.row_linear_w8 import quantized
from blip3o_rt.measure.validate.case import DTYPES, Case, random
from blip3o_rt.ops.dtypes import E4M3


def cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for m, n, k in (
            *((m, 50, 38) for m in (*range(1, 10), 17, 40)),
            *((9, n, 64) for n in (1, 15, 16, 17, 47, 48, 49, 200)),
            *((9, 20, k) for k in (1, 2, 3, 62, 63, 64, 66, 126, 128, 190)),
            (11, 60, 6144),
            (9, 1100, 32),
            (700, 17, 6144),  # more than a slice
            (0, 4, 8),
        ):
            yield Case(f"{m} x {k} x {n}", (random(1, m, k, dtype=dtype), *quantized(2, n, k)))
        weight, scale = quantized(2, 90, 150)
        x = random(1, 12, 150, dtype=dtype)
        yield Case("rows with gaps", (random(4, 12, 2, 150, dtype=dtype)[:, 0], weight, scale))
        yield Case("part of a wider weight", (random(5, 12, 70, dtype=dtype), weight[:, 10:80], scale))
        yield Case("one large activation", (x.index_fill(1, torch.tensor([3]), 3e3), weight, scale))
        yield Case("e4m3", (x, *quantized(2, 90, 150, E4M3)))
        out = torch.zeros(12, 90, dtype=dtype)
        yield Case("given out", (x, weight, scale), {"out": out}, written=("out",))
