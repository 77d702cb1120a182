"""LayerNorm of rows without weights, modulated: (x - mean) / sqrt(var + eps) * (1 + scale) + shift.

Tiling   a program per tile of whole rows (one of 2240 channels, 16 of 256), held in registers, so that the
         variance is that of the differences from the mean. Lanes beyond the width are masked.
Bytes    per element: x once, out once; for bfloat16 4, with a float32 out 6.
FLOPs    8 per element.
Bound    memory.
To tune  Several rows of 2240 a program, since scale and shift, 18 KB, come from the caches for each; rows in
         two tiles, since 45% of the lanes of one are masked.
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import as_rows, options, row_tile, row_warps


@triton.jit
def _layer_norm_modulate(
    x,
    shift,
    scale,
    out,
    rows,
    x_stride,
    out_stride,
    eps,
    width: tl.constexpr,
    block_rows: tl.constexpr,
    block_width: tl.constexpr,
):
    row = (tl.program_id(0) * block_rows + tl.arange(0, block_rows)).to(tl.int64)[:, None]
    column = tl.arange(0, block_width)[None, :]
    inside = (row < rows) & (column < width)
    y = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    y = tl.where(inside, y - (tl.sum(y, axis=1) / width)[:, None], 0.0)
    y *= (1.0 / tl.sqrt(tl.sum(y * y, axis=1) / width + eps))[:, None]
    gain = 1.0 + tl.load(scale + column, mask=column < width, other=0.0).to(tl.float32)
    y = y * gain + tl.load(shift + column, mask=column < width, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + column, y.to(out.dtype.element_ty), mask=inside)


def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float, out: Tensor) -> None:
    """x [..., D] into out [..., D], each with rows at one distance; shift and scale [D] contiguous."""
    x, out = as_rows(x), as_rows(out)
    block_rows, block_width = row_tile(x.shape[1])
    _layer_norm_modulate[(triton.cdiv(len(x), block_rows),)](
        x,
        shift,
        scale,
        out,
        len(x),
        x.stride(0),
        out.stride(0),
        eps,
        width=x.shape[1],
        block_rows=block_rows,
        block_width=block_width,
        **options(row_warps(x.shape[1])),
    )
