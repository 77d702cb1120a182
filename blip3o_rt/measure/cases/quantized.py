"""Cases of products in 8 bits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from blip3o_rt.measure.validate.case import DTYPES, Case, random
from blip3o_rt.measure.validate.finding import Finding, compare_output
from blip3o_rt.ops.dtypes import E4M3, largest_value
from blip3o_rt.ops.registry import Op
from blip3o_rt.weights import row_scales, row_values

E4M3_NO_NUMBER = 0x7F  # but for its sign


def quantized(seed: int, outputs: int, inputs: int, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """Values over their whole range, both ends of it in every row, and scales of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.int8:
        values = torch.randint(-127, 128, (outputs, inputs), generator=generator, dtype=torch.int8)
    else:
        values = e4m3_numbers(torch.randint(0, 256, (outputs, inputs), generator=generator))
    largest = largest_value(dtype)
    values[:, 0] = largest
    values[:, -1] = -largest
    return values, (1 + torch.rand(outputs, generator=generator)) / ((largest + 1) * max(inputs, 1) ** 0.5)


def e4m3_numbers(bits: Tensor) -> Tensor:
    """The e4m3 numbers of these bits, 0 to 255; zero for the two that are no number."""
    return bits.where(bits % 128 != E4M3_NO_NUMBER, 0).to(torch.uint8).view(E4M3)


def row_linear_w8_cases() -> Iterator[Case]:
    """Every remainder of the tiles: rows, outputs and inputs around multiples of 4 and of the vectors."""
    for dtype in DTYPES:
        for m, n, k in (
            *((m, 7, 37) for m in (1, 2, 3, 4, 5, 7, 8, 17, 33)),
            *((1, n, 64) for n in (1, 2, 3, 4, 5, 130)),
            *((2, 5, k) for k in (1, 3, 4, 15, 16, 17, 63, 64, 65, 127, 129, 191)),
            (1, 300, 1024),
            (6, 33, 2048),
            (40, 12, 6144),
            (2, 4400, 192),
            (0, 4, 8),
        ):
            x = random(1, m, k, dtype=dtype)
            yield Case(f"{m} x {k} x {n}", (x, *quantized(2, n, k)))
            yield Case(f"{m} x {k} x {n}, e4m3", (x, *quantized(2, n, k, E4M3)))
        weight, scale = quantized(2, 9, 150)
        bias = random(3, 9, dtype=dtype)
        x = random(1, 3, 150, dtype=dtype)
        yield Case("bias", (x, weight, scale), {"bias": bias})
        yield Case("rows with gaps", (random(4, 3, 2, 150, dtype=dtype)[:, 0], weight, scale))
        yield Case("part of a wider weight", (random(5, 2, 70, dtype=dtype), weight[:, 10:80], scale))
        yield Case("one large activation", (x.index_fill(1, torch.tensor([3]), 3e3), weight, scale))
        yield Case(
            "tiny and no activations", (x * torch.tensor([[1e-30], [0.0], [1.0]]).to(dtype), weight, scale)
        )
        out = torch.zeros(3, 9)
        yield Case("float32 out", (x, weight, scale), {"bias": bias, "out": out}, written=("out",))
        options = {"bias": bias, "out": out}
        yield Case("float32 out, e4m3", (x, *quantized(2, 9, 150, E4M3)), options, written=("out",))
        weight, scale = quantized(2, 4099, 8)
        yield Case("more rows than are widened at once", (random(1, 2, 8, dtype=dtype), weight, scale))


def linear_w8a16_cases() -> Iterator[Case]:
    """Every number of rows in a tile, and outputs and inputs around multiples of a panel and of a vector."""
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


def fp8_case(label: str, dtype: torch.dtype, rows: int, inputs: int, outputs: int) -> Case:
    x, weight = random(1, rows, inputs), random(2, outputs, inputs)
    x *= torch.linspace(0.5, 3, rows)[:, None]
    arguments = [f(matrix, E4M3) for matrix in (x, weight) for f in (row_values, row_scales)]
    return Case(label, tuple(arguments), {"out": torch.zeros(rows, outputs, dtype=dtype)}, written=("out",))


def linear_fp8_cases() -> Iterator[Case]:
    """Sides that a library takes and sides that it does not, one row and many, rows of different sizes."""
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        for rows, inputs, outputs in ((1, 16, 16), (3, 5, 7), (33, 64, 48), (17, 224, 112), (2, 2240, 32)):
            label = f"{rows} x {inputs} x {outputs}, {name}"
            yield (plain := fp8_case(label, dtype, rows, inputs, outputs))
            options = {"bias": random(3, outputs, dtype=dtype), **plain.options}
            yield Case(f"{label}, bias", plain.arguments, options, written=("out",))


def quantize_rows_cases() -> Iterator[Case]:
    """Widths around multiples of the vectors, rows of zeros, and rows that hold no number; int8 and e4m3."""
    for dtype in DTYPES:
        for values in (torch.int8, E4M3):
            name = str(values).removeprefix("torch.")
            for rows, width in ((1, 1), (2, 5), (3, 16), (4, 15), (3, 65), (5, 224), (2, 2240), (0, 8)):
                x = random(1, rows, width, dtype=dtype)
                yield quantize_case(f"{rows} x {width}, {name}", x, values)
            sizes = torch.tensor([[1e-30], [1e-12], [0], [1], [1e12], [1e30]])
            x = random(2, 6, 37, dtype=dtype) * sizes.to(dtype)
            yield quantize_case(f"tiny, no and huge rows, {name}", x, values)
            x = x.clone()
            x[1, 3], x[4, 36] = math.nan, math.inf
            yield quantize_case(f"not numbers, {name}", x, values)
            wide = random(3, 3, 70, dtype=dtype)
            yield quantize_case(f"part of a wider tensor, {name}", wide[:, 10:50], values)
            yield quantize_case(f"given out, {name}", wide, values, torch.zeros(3, 70).to(values))


def quantize_case(label: str, x: Tensor, values: torch.dtype, out: Tensor | None = None) -> Case:
    written: tuple[int | str, ...] = (1,) if out is None else (1, "out")
    return Case(label, (x, torch.zeros(len(x))), {"dtype": values, "out": out}, written)


def quantize_rows_check(
    op: Op[Any, Any], case: Case, results: list[Tensor], exact: list[Tensor]
) -> list[Finding]:
    """The scale is right, and each value's multiple of it a nearest: of two that are equally near, either."""
    x, values, scale = case.arguments[0].double(), results[0], results[1]
    if values.dtype != case.options.get("dtype", torch.int8):
        return [Finding("beyond half a step", math.nan, 0.0, detail=f"dtype {values.dtype}")]
    finite, largest = scale.isfinite(), largest_value(values.dtype)
    numbers, steps = values.double()[finite], scale.double()[finite, None].clamp(min=1e-300)
    beyond = (x[finite] / steps - numbers).abs() / _step_at(numbers, values.dtype) - 0.5
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


def _step_at(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of a value to its neighbors; to the farther one where they differ."""
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


def integers(seed: int, *shape: int) -> Tensor:
    """Seeded int8 values."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)


def integers_case(label: str, rows: int, inputs: int, outputs: int) -> Case:
    return Case(label, (integers(1, rows, inputs), integers(2, outputs, inputs)))


def integer_product_cases() -> Iterator[Case]:
    """Every number of rows in a tile, sizes around a panel and a block of steps, and the largest values."""
    for m, n, k in (
        *((m, 20, 37) for m in (*range(1, 8), 13)),
        *((5, n, 64) for n in (1, 15, 16, 17, 33)),
        *((7, 20, k) for k in (1, 2, 3, 511, 512, 513, 1025)),
        (40, 48, 2240),
        (0, 4, 8),
    ):
        yield integers_case(f"{m} x {k} x {n}", m, k, n)
    largest = torch.full((9, 1600), -127, dtype=torch.int8)
    yield Case("the largest values", (largest, -largest))
    yield Case("part of a wider matrix", (integers(1, 7, 90)[:, 10:70], integers(2, 20, 80)[:, 10:70]))
    values, weight = integers(1, 7, 64), integers(2, 20, 64)
    out = torch.zeros(7, 40, dtype=torch.int32)[:, 5:25]
    yield Case("columns of a wider out", (values, weight), {"out": out}, written=("out",))


def scale_case(label: str, dtype: torch.dtype, rows: int, columns: int) -> Case:
    """Integers larger than float32 tells apart, with scales of rows and a bias."""
    generator = torch.Generator().manual_seed(1)
    product = torch.randint(-(2**26), 2**26, (rows, columns), generator=generator, dtype=torch.int32)
    options = {"row_scale": random(3, rows).abs() / 127, "bias": random(4, columns, dtype=dtype)}
    out = torch.zeros(rows, columns, dtype=dtype)
    return Case(label, (product, random(2, columns).abs() / 127), {"out": out, **options}, written=("out",))


def scale_product_cases() -> Iterator[Case]:
    """Integers larger than float32 tells apart, with and without scales of rows and a bias."""
    for dtype in DTYPES:
        for rows, columns in ((1, 1), (2, 5), (3, 16), (4, 15), (3, 65), (2, 1024), (0, 8)):
            label = f"{rows} x {columns}"
            both = scale_case(f"{label}, {dtype}", dtype, rows, columns)
            yield both
            no_bias = {**both.options, "bias": None}
            yield Case(f"{label}, no bias, {dtype}", both.arguments, no_bias, written=("out",))
            floating, out = random(5, rows, columns, dtype=dtype), torch.zeros(rows, columns, dtype=dtype)
            yield Case(
                f"{label}, columns alone", (floating, both.arguments[1]), {"out": out}, written=("out",)
            )
        product, scale = scale_case("", dtype, 3, 20).arguments
        wide = torch.zeros(3, 40, dtype=dtype)
        yield Case(f"columns of a wider out, {dtype}", (product, scale), {"out": wide[:, 10:30]})
