"""The factor of an RMSNorm for each row, 1 / sqrt(mean(x^2) + eps), for kernels that see one head of it.

Tiling   a program per tile of whole rows (one of 2240 channels).
Bytes    each row once, 4 per row written.
FLOPs    2 per element.
Bound    memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import options, row_tile, row_warps


@triton.jit
def _inverse_rms(
    x,
    out,
    tokens,
    x_batch,
    x_row,
    eps,
    width: tl.constexpr,
    block_rows: tl.constexpr,
    block_width: tl.constexpr,
):
    """1 / sqrt(mean(x^2) + eps) of the rows x [B, tokens, width] -> [B, tokens]."""
    row = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    batch = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, block_width)[None, :]
    inside = (row < tokens)[:, None] & (column < width)
    place = x + batch * x_batch + row.to(tl.int64)[:, None] * x_row + column
    y = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    factor = 1.0 / tl.sqrt(tl.sum(y * y, axis=1) / width + eps)
    tl.store(out + batch * tokens + row, factor, mask=row < tokens)


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) of the rows of x [B, N, D] -> [B, N] fp32."""
    batch, tokens, width = x.shape
    factors = torch.empty((batch, tokens), dtype=torch.float32, device=x.device)
    block_rows, block_width = row_tile(width)
    _inverse_rms[(triton.cdiv(tokens, block_rows), batch)](
        x,
        factors,
        tokens,
        x.stride(0),
        x.stride(1),
        eps,
        width=width,
        block_rows=block_rows,
        block_width=block_width,
        **options(row_warps(width)),
    )
    return factors
