"""Product of many rows with a weight matrix in 8 bits, a prompt's work in the fast tier."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from blip3o_rt.ops import native
from blip3o_rt.ops.linear import unavailable
from blip3o_rt.ops.registry import op
from blip3o_rt.ops.row_linear_w8 import unknown_to_cpu

BLOCK_ROWS = 1024  # of the weight that exist as floating-point numbers at a time: they stay in the caches


@op(tolerance={torch.float32: 4e-6, torch.bfloat16: 2**-8})
def linear_w8a16(x: Tensor, weight: Tensor, scale: Tensor, *, out: Tensor | None = None) -> Tensor:
    """x (weight scale)^T for x [M, K], weight int8 [N, K], scale float32 [N] -> [M, N] in the dtype of x.

    As row_linear_w8, of e4m3 weights too, for rows so many that arithmetic is the limit: the weight is
    widened once for all of them. A library's product rounds to bfloat16 before the scale is applied, so the
    tolerance there is that of one more rounding. `out` must not overlap x.
    """
    out = torch.empty(len(x), len(weight), dtype=x.dtype, device=x.device) if out is None else out
    for first in range(0, len(weight), BLOCK_ROWS):
        block = slice(first, first + BLOCK_ROWS)
        torch.mul(F.linear(x, weight[block].to(x.dtype)), scale[block], out=out[:, block])
    return out


def _supports(x: Tensor, weight: Tensor, scale: Tensor, *, out: Tensor | None = None) -> str | None:
    return unknown_to_cpu(weight) if x.shape[-1] % 2 == 0 else "takes an even K"


@linear_w8a16.implementation(
    "cpu", device="cpu", dtypes=(torch.bfloat16,), supports=_supports, available=unavailable
)
def _cpu(x: Tensor, weight: Tensor, scale: Tensor, *, out: Tensor | None = None) -> Tensor:
    out = torch.empty((len(x), len(weight)), dtype=x.dtype) if out is None else out
    native.cpu().linear_w8a16(x, weight, scale, out=out)
    return out
