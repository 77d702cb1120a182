"""The product inside ops of few rows, by what its weight is kept in."""

from __future__ import annotations

import torch
from torch import Tensor

from blip3o_rt.ops.row_linear import row_linear
from blip3o_rt.ops.row_linear_int8 import row_linear_int8


def unknown_weight(x: Tensor, weight: Tensor, scale: Tensor | None) -> str | None:
    """None where a weight is in the dtype of x, or int8 with a scale for each row; else what is accepted."""
    if weight.dtype == (x.dtype if scale is None else torch.int8):
        return None
    return "takes x and weight of one dtype, or an int8 weight with a scale"


def product(x: Tensor, weight: Tensor, scale: Tensor | None, out: Tensor) -> Tensor:
    """x weight^T -> out by the op for the weight."""
    if scale is None:
        return row_linear(x, weight, out=out)
    return row_linear_int8(x, weight, scale, out=out)


def reference_product(x: Tensor, weight: Tensor, scale: Tensor | None, out: Tensor | None = None) -> Tensor:
    """x weight^T by the definition of that op."""
    if scale is None:
        return row_linear.reference(x, weight, out=out)
    return row_linear_int8.reference(x, weight, scale, out=out)
