"""Product of a few rows with a weight matrix, the work of a decoding step."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from blip3o_rt.ops import native
from blip3o_rt.ops.registry import BF16, FLOATS, op, weight_dtype_matches
from blip3o_rt.ops.rounding import arithmetic_dtype, deliver


@op(tolerance={torch.float32: 4e-6, torch.bfloat16: BF16})
def row_linear(x: Tensor, weight: Tensor, *, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """x weight^T + bias for x [M, K], weight [N, K], bias [N] -> [M, N] in the dtype of x, or of `out`.

    `out` may be float32 for bfloat16 operands (logits). Meant for M up to about 64. Each row has the same
    bits whatever the other rows are and however many; the reference takes rows one at a time for that.
    """
    if len(x) > 1:
        return deliver(torch.cat([_product(row, weight, bias, out) for row in x.split(1)]), x.dtype, out)
    return deliver(_product(x, weight, bias, out), x.dtype, out)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    """The product before it is rounded to the dtype of `out`, or, where torch rounds the same way, after."""
    if x.dtype == torch.bfloat16 and (out is None or out.dtype == x.dtype):
        return F.linear(x, weight, bias)  # accumulates in float32, rounds once; spares a copy of the weight
    wide = arithmetic_dtype(x)
    return F.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))


@row_linear.implementation(
    "cpu", device="cpu", dtypes=FLOATS, supports=weight_dtype_matches, available=native.cpu_unavailable
)
def _cpu(x: Tensor, weight: Tensor, *, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    out = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype) if out is None else out
    native.cpu().row_linear(x, weight, bias, out)
    return out
