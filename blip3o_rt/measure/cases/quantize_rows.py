"""Widths around multiples of the vectors, rows of zeros, and rows that hold no number; int8 and e4m3."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from blip3o_rt.measure.validate.case import DTYPES, Case, random
from blip3o_rt.measure.validate.finding import Finding, compare_output
from blip3o_rt.ops.dtypes import E4M3, largest_value
from blip3o_rt.ops.registry import Op


def cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for values in (torch.int8, E4M3):
            name = str(values).removeprefix("torch.")
            for rows, width in ((1, 1), (2, 5), (3, 16), (4, 15), (3, 65), (5, 224), (2, 2240), (0, 8)):
                x = random(1, rows, width, dtype=dtype)
                yield _case(f"{rows} x {width}, {name}", x, values)
            sizes = torch.tensor([[1e-30], [1e-12], [0], [1], [1e12], [1e30]])
            x = random(2, 6, 37, dtype=dtype) * sizes.to(dtype)
            yield _case(f"tiny, no and huge rows, {name}", x, values)
            x = x.clone()
            x[1, 3], x[4, 36] = math.nan, math.inf
            yield _case(f"not numbers, {name}", x, values)
            wide = random(3, 3, 70, dtype=dtype)
            yield _case(f"part of a wider tensor, {name}", wide[:, 10:50], values)
            yield _case(f"given out, {name}", wide, values, torch.zeros(3, 70).to(values))


def _case(label: str, x: Tensor, values: torch.dtype, out: Tensor | None = None) -> Case:
    written: tuple[int | str, ...] = (1,) if out is None else (1, "out")
    return Case(label, (x, torch.zeros(len(x))), {"dtype": values, "out": out}, written)


def check(op: Op[Any, Any], case: Case, results: list[Tensor], exact: list[Tensor]) -> list[Finding]:
    """The scale is right, and each value's multiple of it a nearest: of two that are equally near, either."""
    x, values, scale = case.arguments[0].double(), results[0], results[1]
    if values.dtype != case.options.get("dtype", torch.int8):
        return [Finding("beyond half a step", math.nan, 0.0, detail=f"dtype {values.dtype}")]
    finite, largest = scale.isfinite(), largest_value(values.dtype)
    numbers, steps = values.double()[finite], scale.double()[finite, None].clamp(min=1e-300)
    beyond = (x[finite] / steps - numbers).abs() / _step(numbers, values.dtype) - 0.5
    most = float(numbers.abs().amax()) if numbers.numel() else 0.0
    return [
        compare_output(op, scale, exact[1], "scale"),
        Finding(
            "beyond half a step",
            max([0.0, *beyond.flatten().tolist()]),
            largest * op.tolerance[x_dtype(case)],
        ),
        Finding("values out of range", float(most > largest), 0.0),
    ]


def _step(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of a value to its neighbours; to the farther one where they differ."""
    if not dtype.is_floating_point:
        return torch.ones_like(values)
    numbers = torch.finfo(dtype)
    _, exponent = torch.frexp(values)
    return torch.ldexp(torch.full_like(values, numbers.eps / 2), exponent).clamp(
        min=numbers.tiny * numbers.eps
    )


def x_dtype(case: Case) -> torch.dtype:
    """The dtype of a case's rows."""
    return case.arguments[0].dtype
