"""Product of a few rows with a weight matrix, the work of a decoding step."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from blip3o_rt.errors import OpError
from blip3o_rt.ops import native
from blip3o_rt.ops.registry import FLOATS, op, weight_dtype_matches
from blip3o_rt.ops.rounding import arithmetic_dtype, deliver

WIDENED_ROWS = 4096  # rows of a bfloat16 weight that exist in float32 at a time


@op(tolerance={torch.float32: 4e-6, torch.bfloat16: 4e-6})
def row_linear(x: Tensor, weight: Tensor, *, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """x weight^T + bias for x [M, K], weight [N, K], bias [N] -> [M, N] in the dtype of x, or of `out`.

    `out` may be float32 for bfloat16 operands (logits). It must not overlap x; OpError if it begins where x
    does. Meant for the rows of a batch, not for those of a prompt. Each row of a contiguous x has the same
    bits whatever the other rows are and however many; the reference takes rows one at a time for that.
    """
    if out is not None and x.numel() and out.data_ptr() == x.data_ptr():
        raise OpError("row_linear: out must not be the memory of x; give it memory of its own")
    rows = x.split(1) if len(x) > 1 else (x,)
    wide = arithmetic_dtype(x)
    rounds_once = x.dtype == torch.bfloat16 and (out is None or out.dtype == x.dtype)
    if weight.dtype == x.dtype and (x.dtype == wide or rounds_once):  # torch sums bfloat16 in float32
        return deliver(torch.cat([F.linear(row, weight, bias) for row in rows]), x.dtype, out)
    blocks = [_widened_product(rows, block, wide) for block in weight.split(WIDENED_ROWS)]
    result = torch.cat(blocks, dim=1)
    return deliver(result if bias is None else result + bias.to(wide), x.dtype, out)


def _widened_product(rows: tuple[Tensor, ...], weight: Tensor, wide: torch.dtype) -> Tensor:
    weight = weight.to(wide)
    return torch.cat([F.linear(row.to(wide), weight) for row in rows])


@row_linear.implementation(
    "cuda", device="cuda", dtypes=FLOATS, supports=weight_dtype_matches, available=native.cuda_unavailable
)
def _cuda(x: Tensor, weight: Tensor, *, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    if out is None:
        out = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    native.cuda().row_linear(x, weight, bias=bias, out=out)
    return out


@row_linear.implementation(
    "cpu", device="cpu", dtypes=FLOATS, supports=weight_dtype_matches, available=native.cpu_unavailable
)
def _cpu(x: Tensor, weight: Tensor, *, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    out = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype) if out is None else out
    native.cpu().row_linear(x, weight, bias=bias, out=out)
    return out
