"""Integers larger than float32 tells apart, with and without scales of rows and a bias."""

from collections.abc import Iterator

import torch

from blip3o_rt.measure.validate.case import DTYPES, Case, random


def cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(1)
    for dtype in DTYPES:
        for rows, columns in ((1, 1), (2, 5), (3, 16), (4, 15), (3, 65), (2, 1024), (0, 8)):
            product = torch.randint(-(2**26), 2**26, (rows, columns), generator=generator, dtype=torch.int32)
            scale, row_scale = random(2, columns).abs() / 127, random(3, rows).abs() / 127
            out, bias = torch.zeros(rows, columns, dtype=dtype), random(4, columns, dtype=dtype)
            both = {"out": out, "row_scale": row_scale, "bias": bias}
            label = f"{rows} x {columns}"
            yield Case(f"{label}, {dtype}", (product, scale), both, written=("out",))
            yield Case(
                f"{label}, no bias, {dtype}", (product, scale), {**both, "bias": None}, written=("out",)
            )
            floating = random(5, rows, columns, dtype=dtype)
            yield Case(f"{label}, columns alone", (floating, scale), {"out": out}, written=("out",))
        wide = torch.zeros(3, 40, dtype=dtype)
        product = torch.randint(-999, 999, (3, 20), generator=generator, dtype=torch.int32)
        yield Case(f"columns of a wider out, {dtype}", (product, random(2, 20)), {"out": wide[:, 10:30]})
