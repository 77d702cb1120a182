"""The product inside ops of few rows, by what its weight is kept in."""

from __future__ import annotations

import torch
from torch import Tensor

from blip3o_rt.ops.row_linear import row_linear
from blip3o_rt.ops.row_linear_w8 import row_linear_w8
from blip3o_rt.weights import E4M3


def unknown_weight(x: Tensor, weight: Tensor, scale: Tensor | None) -> str | None:
    """None where a weight is in the dtype of x, or in 8 bits and its rows have scales; else what is taken."""
    if weight.dtype in ((x.dtype,) if scale is None else (torch.int8, E4M3)):
        return None
    return "takes x and weight of one dtype, or an int8 or e4m3 weight with a scale"


def product(x: Tensor, weight: Tensor, scale: Tensor | None, out: Tensor) -> Tensor:
    """x weight^T -> out by the op for the weight."""
    if scale is None:
        return row_linear(x, weight, out=out)
    return row_linear_w8(x, weight, scale, out=out)


def reference_product(x: Tensor, weight: Tensor, scale: Tensor | None, out: Tensor | None = None) -> Tensor:
    """x weight^T by the definition of that op."""
    if scale is None:
        return row_linear.reference(x, weight, out=out)
    return row_linear_w8.reference(x, weight, scale, out=out)
