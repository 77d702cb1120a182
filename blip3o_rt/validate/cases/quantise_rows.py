"""Widths around multiples of the vectors, rows of zeros, and rows that hold no number."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from blip3o_rt.ops.registry import Op
from blip3o_rt.quantisation import LARGEST
from blip3o_rt.validate.case import DTYPES, Case, random
from blip3o_rt.validate.finding import Finding, compare_output


def cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for rows, width in ((1, 1), (2, 5), (3, 16), (4, 15), (3, 65), (5, 224), (2, 2240), (0, 8)):
            x = random(1, rows, width, dtype=dtype)
            yield Case(f"{rows} x {width}", (x, torch.zeros(rows)), written=(1,))
        sizes = torch.tensor([1e-30, 1e-12, 0.0, 1.0, 1e12, 1e30])
        x = random(2, 6, 37, dtype=dtype) * sizes[:, None].to(dtype)
        yield Case("tiny, no and huge rows", (x, torch.zeros(6)), written=(1,))
        x[1, 3], x[4, 36] = math.nan, math.inf
        yield Case("not numbers", (x, torch.zeros(6)), written=(1,))
        wide = random(3, 3, 70, dtype=dtype)
        yield Case("part of a wider tensor", (wide[:, 10:50], torch.zeros(3)), written=(1,))
        out = torch.zeros(3, 70, dtype=torch.int8)
        yield Case("given out", (wide, torch.zeros(3)), {"out": out}, written=(1, "out"))


def check(op: Op[Any, Any], case: Case, results: list[Tensor], exact: list[Tensor]) -> list[Finding]:
    """The scale is right, and each value a nearest multiple of it: of two that are equally near, either."""
    x, values, scale = case.arguments[0], results[0].double(), results[1].double()
    finite = scale.isfinite()
    steps = (x.double() - values * scale[:, None]).abs()[finite] / scale[finite, None].clamp(min=1e-300)
    too_large = values[finite].abs() > LARGEST
    return [
        compare_output(op, results[1], exact[1], "scale"),
        Finding("steps off", max([0.0, *steps.flatten().tolist()]), 0.5 + LARGEST * op.tolerance[x.dtype]),
        Finding("values out of range", float(too_large.sum()), 0.0),
    ]
