"""Sides that a library takes and sides that it does not, one row and many, rows of different sizes."""

from collections.abc import Iterator

import torch

from blip3o_rt.measure.validate.case import DTYPES, Case, random
from blip3o_rt.ops.dtypes import E4M3
from blip3o_rt.weights import row_scales, row_values


def cases() -> Iterator[Case]:
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        for rows, inputs, outputs in ((1, 16, 16), (3, 5, 7), (33, 64, 48), (17, 224, 112), (2, 2240, 32)):
            x, weight = random(1, rows, inputs), random(2, outputs, inputs)
            x *= torch.linspace(0.5, 3, rows)[:, None]
            arguments = [f(matrix, E4M3) for matrix in (x, weight) for f in (row_values, row_scales)]
            out, label = torch.zeros(rows, outputs, dtype=dtype), f"{rows} x {inputs} x {outputs}, {name}"
            yield Case(label, tuple(arguments), {"out": out}, written=("out",))
            options = {"bias": random(3, outputs, dtype=dtype), "out": out}
            yield Case(f"{label}, bias", tuple(arguments), options, written=("out",))
