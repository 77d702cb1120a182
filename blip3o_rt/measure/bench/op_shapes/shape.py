"""An op at one of the model's shapes, and the product that several stages have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blip3o_rt.measure.bench.work import FLOPS_PER_PRODUCT, Work
from blip3o_rt.measure.cases.linear import product_case
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


def linear(tokens: int, outputs: int, inputs: int) -> Make:
    """The product of tokens with a weight [outputs, inputs], with a bias."""
    return lambda dtype: product_case(
        "", dtype, tokens, outputs, inputs, bias=random(3, outputs, dtype=dtype)
    )
