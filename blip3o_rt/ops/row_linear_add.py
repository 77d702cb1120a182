"""Product of a few rows with a weight matrix, added to the residual stream."""

from __future__ import annotations

import torch
from torch import Tensor

from blip3o_rt.errors import OpError
from blip3o_rt.ops import native
from blip3o_rt.ops.registry import FLOATS, op
from blip3o_rt.ops.rounding import arithmetic_dtype
from blip3o_rt.ops.row_linear_w8 import unknown_to_cpu
from blip3o_rt.ops.row_product import reference_product, unknown_weight


@op(tolerance={torch.float32: 4e-6, torch.bfloat16: 2e-2})
def row_linear_add(x: Tensor, weight: Tensor, residual: Tensor, *, scale: Tensor | None = None) -> Tensor:
    """residual += x weight^T in place for x [M, K], weight [N, K], residual [M, N]; returns residual.

    With `scale` float32 [N] the weight is int8 or e4m3, as in row_linear_w8. The product is rounded to the
    dtype of x before it is added, so that the bits are those of row_linear and an addition; hence the
    tolerance of bfloat16. The residual must not overlap x; OpError if it begins where x does. Each row of
    a contiguous x has the same bits whatever the other rows are and however many.
    """
    if x.numel() and residual.data_ptr() == x.data_ptr():
        raise OpError("row_linear_add: residual must not be the memory of x; give it memory of its own")
    wide = arithmetic_dtype(x)
    return residual.copy_(residual.to(wide) + reference_product(x, weight, scale).to(wide))


def _supports(x: Tensor, weight: Tensor, residual: Tensor, *, scale: Tensor | None = None) -> str | None:
    return unknown_weight(x, weight, scale)


def _supports_on_cpu(
    x: Tensor, weight: Tensor, residual: Tensor, *, scale: Tensor | None = None
) -> str | None:
    return unknown_weight(x, weight, scale) or unknown_to_cpu(weight)


@row_linear_add.implementation(
    "cuda", device="cuda", dtypes=FLOATS, supports=_supports, available=native.cuda_unavailable
)
def _cuda(x: Tensor, weight: Tensor, residual: Tensor, *, scale: Tensor | None = None) -> Tensor:
    native.cuda().row_linear_add(x, weight, residual, scale=scale)
    return residual


@row_linear_add.implementation(
    "cpu", device="cpu", dtypes=FLOATS, supports=_supports_on_cpu, available=native.cpu_unavailable
)
def _cpu(x: Tensor, weight: Tensor, residual: Tensor, *, scale: Tensor | None = None) -> Tensor:
    native.cpu().row_linear_add(x, weight, residual, scale=scale)
    return residual
