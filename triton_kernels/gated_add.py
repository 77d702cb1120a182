"""A sublayer's result into the residual stream through a gate: residual += gate * x.

Tiling   a program per tile of whole rows (one of 2240 channels); lanes beyond the width are masked.
Bytes    per element: residual and x once, residual written once; for bfloat16 6.
FLOPs    2 per element.
Bound    memory.
To tune  As layer_norm_modulate, several rows of 2240 a program.
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import as_rows, options, row_tile, row_warps


@triton.jit
def _gated_add(
    residual,
    x,
    gate,
    rows,
    residual_stride,
    x_stride,
    width: tl.constexpr,
    block_rows: tl.constexpr,
    block_width: tl.constexpr,
):
    row = (tl.program_id(0) * block_rows + tl.arange(0, block_rows)).to(tl.int64)[:, None]
    column = tl.arange(0, block_width)[None, :]
    inside = (row < rows) & (column < width)
    place = residual + row * residual_stride + column
    added = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    added *= tl.load(gate + column, mask=column < width, other=0.0).to(tl.float32)
    total = tl.load(place, mask=inside, other=0.0).to(tl.float32) + added
    tl.store(place, total.to(residual.dtype.element_ty), mask=inside)


def gated_add(residual: Tensor, x: Tensor, gate: Tensor) -> None:
    """residual and x [..., D], each with rows at one distance; gate [D] contiguous."""
    residual, x = as_rows(residual), as_rows(x)
    block_rows, block_width = row_tile(x.shape[1])
    _gated_add[(triton.cdiv(len(x), block_rows),)](
        residual,
        x,
        gate,
        len(x),
        residual.stride(0),
        x.stride(0),
        width=x.shape[1],
        block_rows=block_rows,
        block_width=block_width,
        **options(row_warps(x.shape[1])),
    )
