"""Rows in 8-bit floating point: e4m3 multiples of each row's scale, its largest magnitude / 448.

Tiling   a program per tile of whole rows (one of 2240 or 5600 channels), held in registers.
Bytes    per element: x once, 1 for the value; for bfloat16 3, and 4 per row.
FLOPs    3 per element.
Bound    memory.
To tune  Warps for rows of 5600. The pass would go into the LayerNorm before most of these products.
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import as_rows, options, row_tile, row_warps

LARGEST = 448.0


@triton.jit
def _quantize_rows(
    x,
    scale,
    out,
    rows,
    x_stride,
    out_stride,
    largest: tl.constexpr,
    width: tl.constexpr,
    block_rows: tl.constexpr,
    block_width: tl.constexpr,
):
    row = (tl.program_id(0) * block_rows + tl.arange(0, block_rows)).to(tl.int64)
    column = tl.arange(0, block_width)[None, :]
    inside = (row < rows)[:, None] & (column < width)
    y = tl.load(x + row[:, None] * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    # Magnitudes order as their bits do, and a NaN, which a maximum drops, is above every number.
    magnitude = tl.max(y.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    unit = magnitude.to(tl.float32, bitcast=True) / largest
    tl.store(scale + row, unit, mask=row < rows)
    inverse = 1.0 / unit
    inverse = tl.where(inverse <= 3.4028234663852886e38, inverse, 0.0)  # of zeros, and next to them
    values = y * inverse[:, None]
    values = tl.where(tl.abs(values) < largest, values, tl.where(values < 0, -largest, largest))
    tl.store(out + row[:, None] * out_stride + column, values.to(out.dtype.element_ty), mask=inside)


def quantize_rows(x: Tensor, scale: Tensor, out: Tensor) -> None:
    """x [..., K] into out e4m3 [..., K], each with rows at one distance; scale fp32 [...] contiguous."""
    x, out = as_rows(x), as_rows(out)
    block_rows, block_width = row_tile(x.shape[1])
    _quantize_rows[(triton.cdiv(len(x), block_rows),)](
        x,
        scale,
        out,
        len(x),
        x.stride(0),
        out.stride(0),
        largest=LARGEST,
        width=x.shape[1],
        block_rows=block_rows,
        block_width=block_width,
        **options(row_warps(x.shape[1])),
    )
