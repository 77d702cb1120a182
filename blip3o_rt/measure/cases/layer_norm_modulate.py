"""Widths around the vector lengths, fp32 modulation of bf16 rows, means far from zero, constant rows."""

from collections.abc import Iterator

import torch

from blip3o_rt.measure.validate.case import DTYPES, Case, random

EPS = 1e-6


def cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for width in (1, 7, 16, 33, 224, 1030):
            shift, scale = random(2, width, scale=0.5), random(3, width, scale=0.5)
            yield Case(f"width {width}", (random(1, 2, 3, width, dtype=dtype), shift, scale, EPS))
        shift, scale = random(2, 40), random(3, 40)
        narrow = shift.to(dtype), scale.to(dtype)
        x = random(4, 2, 5, 40, dtype=dtype)
        yield Case("modulation in the dtype of x", (x, *narrow, EPS))
        yield Case("rows with gaps", (random(5, 2, 5, 80, dtype=dtype)[..., 40:], shift, scale, EPS))
        yield Case("large eps", (random(6, 3, 40, dtype=dtype, scale=1e-3), shift, scale, 1e-2))
        yield Case("mean far from zero", (random(7, 3, 40, dtype=dtype) + 8, shift, scale, EPS))
        yield Case("constant rows", (torch.full((3, 40), 2.5, dtype=dtype), shift, scale, EPS))
        yield Case("many rows", (random(8, 2, 300, 40, dtype=dtype), shift, scale, EPS))
        for out_dtype in dict.fromkeys((dtype, torch.float32)):
            out = random(9, 2, 5, 40, dtype=out_dtype)
            yield Case(f"given out {out_dtype}", (x, shift, scale, EPS), {"out": out}, written=("out",))
