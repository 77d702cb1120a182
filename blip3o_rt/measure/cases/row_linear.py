"""Every remainder of the tiles: rows, outputs and inputs around multiples of 4 and of the vector lengths."""

from collections.abc import Iterator

import torch

from blip3o_rt.measure.validate.case import PRODUCTS, Case, random


def cases() -> Iterator[Case]:
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
            weight = random(2, n, k, dtype=weights, scale=k**-0.5)
            yield Case(f"{m} x {k} x {n}{beside}", (random(1, m, k, dtype=dtype), weight))
        weight, bias = random(2, 9, 50, dtype=weights), random(3, 9, dtype=dtype)
        yield Case(f"bias{beside}", (random(1, 3, 50, dtype=dtype), weight), {"bias": bias})
        yield Case(f"rows with gaps{beside}", (random(4, 3, 2, 50, dtype=dtype)[:, 0], weight))
        yield Case(f"part of a wider weight{beside}", (random(5, 2, 20, dtype=dtype), weight[:, 10:30]))
        out = torch.zeros(3, 9)
        yield Case(
            f"float32 out{beside}",
            (random(1, 3, 50, dtype=dtype), weight),
            {"bias": bias, "out": out},
            written=("out",),
        )
        weight, out = random(2, 4099, 8, dtype=weights), torch.zeros(2, 4099)
        yield Case("more rows than are widened at once", (random(1, 2, 8, dtype=dtype), weight), {"out": out})
