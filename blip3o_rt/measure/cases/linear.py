"""Every number of rows in a tile, and outputs and inputs around multiples of a panel and of a vector."""

from collections.abc import Iterator

import torch

from blip3o_rt.measure.validate.case import PRODUCTS, Case, random


def cases() -> Iterator[Case]:
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
            weight = random(2, n, k, dtype=weights, scale=k**-0.5)
            yield Case(f"{m} x {k} x {n}{beside}", (random(1, m, k, dtype=dtype), weight))
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
