"""Every remainder of the tiles: rows, outputs and inputs around multiples of 4 and of the vectors."""

from collections.abc import Iterator

import torch
from torch import Tensor

from blip3o_rt.measure.validate.case import DTYPES, Case, random
from blip3o_rt.ops.dtypes import E4M3, largest_value

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


def cases() -> Iterator[Case]:
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
