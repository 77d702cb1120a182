"""An op at one of the model's shapes, and inputs that several stages give their ops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blip3o_rt.measure.bench.work import FLOPS_PER_PRODUCT, Work
from blip3o_rt.measure.validate.case import Case, random

BOTH = (torch.float32, torch.bfloat16)
FP32 = (torch.float32,)
Make = Callable[[torch.dtype], Case]


@dataclass(frozen=True)
class OpShape:
    """An op at one of the model's shapes.

    make: the inputs in a dtype. moved: elements of the activations' dtype, read or written, if not those of
    all inputs and the result. reads: little of that is written. products: multiply-adds. check: smaller
    inputs for the comparison with float64, where the shape itself is large.
    """

    op: str
    label: str
    make: Make
    products: int = 0
    moved: int | None = None
    reads: bool = False
    dtypes: tuple[torch.dtype, ...] = BOTH
    check: Make | None = None

    def work(self, case: Case, result: Tensor) -> Work:
        """Bytes read and written, and operations, of one call."""
        flops = FLOPS_PER_PRODUCT * self.products
        if self.moved is not None:
            return Work(self.moved * case.arguments[0].element_size(), flops)
        tensors = [*case.arguments, *case.options.values()]
        # What is updated in place is read and written; the result may be one of the arguments.
        written = [case.arguments[w] if isinstance(w, int) else case.options[w] for w in case.written]
        outputs = written or [result]
        return Work(sum(t.numel() * t.element_size() for t in (*tensors, *outputs) if _is_tensor(t)), flops)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def linear(tokens: int, rows: int, columns: int) -> Make:
    """Of a weight [rows, columns] with a bias."""
    return lambda dtype: Case(
        "",
        (
            random(1, tokens, columns, dtype=dtype),
            random(2, rows, columns, dtype=dtype, scale=columns**-0.5),
            random(3, rows, dtype=dtype),
        ),
    )


def linear_attention(
    batch: int, tokens: int, heads: int, head_dim: int, dtype: torch.dtype, *, norm: bool
) -> Case:
    """With or without a norm of queries and keys."""
    width = heads * head_dim
    weights = [1 + random(seed, width, scale=0.3) for seed in (2, 3)]
    norms = tuple(weight.to(dtype) for weight in weights) if norm else (None, None)
    return Case("", (random(1, batch, tokens, 3 * width, dtype=dtype), *norms, heads, 1e-5))


def depthwise_glu(batch: int, side: int, hidden: int) -> Make:
    """To `hidden` channels of square images."""

    def make(dtype: torch.dtype) -> Case:
        biases = [random(seed, 2 * hidden, dtype=dtype) for seed in (2, 4)]
        weight = random(3, 2 * hidden, 1, 3, 3, dtype=dtype, scale=1 / 3)
        x = random(1, batch, side, side, 2 * hidden, dtype=dtype)
        return Case("", (x, biases[0], weight, biases[1]))

    return make
