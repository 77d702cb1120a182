"""Product of a few rows with a weight matrix in 8 bits, a decoding step's work in the fast tier."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from blip3o_rt.errors import OpError
from blip3o_rt.ops import native
from blip3o_rt.ops.registry import FLOATS, op
from blip3o_rt.ops.rounding import arithmetic_dtype, deliver
from blip3o_rt.weights import E4M3

WIDENED_ROWS = 4096  # rows of the weight that exist as wide floating-point numbers at a time


def unknown_to_cpu(weight: Tensor) -> str | None:
    """None but for an e4m3 weight, of which the CPU has no kernels: then the reason."""
    return "takes no e4m3 weight, which is for GPUs" if weight.dtype == E4M3 else None


@op(tolerance={torch.float32: 4e-6, torch.bfloat16: 4e-6})
def row_linear_w8(
    x: Tensor, weight: Tensor, scale: Tensor, *, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """x (weight scale)^T + bias for x [M, K], weight int8 [N, K], scale float32 [N], bias [N] -> [M, N].

    The weight may be e4m3 as well. Row n of the matrix that is meant is scale[n] weight[n]: only the weight
    is quantized, x is not. `out` may be float32 for a bfloat16 x (logits). It must not overlap x; OpError if
    it begins where x does. Meant for one row or a few: with more, arithmetic is the limit and not memory, and
    less of it saves no time. Each row has the same bits whatever the other rows are and however many.
    """
    if out is not None and x.numel() and out.data_ptr() == x.data_ptr():
        raise OpError("row_linear_w8: out must not be the memory of x; give it memory of its own")
    rows = x.split(1) if len(x) > 1 else (x,)
    wide = arithmetic_dtype(x)
    blocks = []
    for values, factors in zip(weight.split(WIDENED_ROWS), scale.split(WIDENED_ROWS), strict=True):
        matrix = values.to(wide) * factors.to(wide)[:, None]
        blocks.append(torch.cat([F.linear(row.to(wide), matrix) for row in rows]))
    result = torch.cat(blocks, dim=1)
    return deliver(result if bias is None else result + bias.to(wide), x.dtype, out)


@row_linear_w8.implementation("cuda", device="cuda", dtypes=FLOATS, available=native.cuda_unavailable)
def _cuda(
    x: Tensor, weight: Tensor, scale: Tensor, *, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    if out is None:
        out = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    native.cuda().row_linear_w8(x, weight, scale, bias=bias, out=out)
    return out


def _supports(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> str | None:
    return unknown_to_cpu(weight)


@row_linear_w8.implementation(
    "cpu", device="cpu", dtypes=FLOATS, supports=_supports, available=native.cpu_unavailable
)
def _cpu(
    x: Tensor, weight: Tensor, scale: Tensor, *, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    out = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype) if out is None else out
    native.cpu().row_linear_w8(x, weight, scale, bias=bias, out=out)
    return out
