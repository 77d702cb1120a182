"""A sublayer's result into the residual stream, and the stream's modulated LayerNorm, in one pass.

Tiling   as layer_norm_modulate: a program per tile of whole rows, held in registers. The sum is rounded to
         the residual's dtype before it is normed, as if it had been read again.
Bytes    per element: residual and x once, residual and out written once; for bfloat16 8, where two kernels
         move 10. An image without an x takes one row in its place.
FLOPs    10 per element.
Bound    memory.
To tune  As layer_norm_modulate.
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import as_rows, options, row_tile, row_warps


@triton.jit
def _add_layer_norm_modulate(
    residual,
    x,
    gate,
    constant,
    shift,
    scale,
    out,
    rows,
    skipped,
    residual_stride,
    x_stride,
    out_stride,
    eps,
    width: tl.constexpr,
    block_rows: tl.constexpr,
    block_width: tl.constexpr,
):
    row = (tl.program_id(0) * block_rows + tl.arange(0, block_rows)).to(tl.int64)[:, None]
    column = tl.arange(0, block_width)[None, :]
    known, inside = column < width, (row < rows) & (column < width)
    added = tl.load(x + (row - skipped) * x_stride + column, mask=inside & (row >= skipped), other=0.0)
    added = added.to(tl.float32)
    if gate is not None:
        added *= tl.load(gate + column, mask=known, other=0.0).to(tl.float32)
    if constant is not None:
        added = tl.where(
            row < skipped, tl.load(constant + column, mask=known, other=0.0).to(tl.float32), added
        )
    place = residual + row * residual_stride + column
    total = tl.load(place, mask=inside, other=0.0).to(tl.float32) + added
    total = total.to(residual.dtype.element_ty)
    tl.store(place, total, mask=inside)
    y = total.to(tl.float32)
    y = tl.where(inside, y - (tl.sum(y, axis=1) / width)[:, None], 0.0)
    y *= (1.0 / tl.sqrt(tl.sum(y * y, axis=1) / width + eps))[:, None]
    gain = 1.0 + tl.load(scale + column, mask=known, other=0.0).to(tl.float32)
    y = y * gain + tl.load(shift + column, mask=known, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + column, y.to(out.dtype.element_ty), mask=inside)


def add_layer_norm_modulate(
    residual: Tensor,
    x: Tensor,
    gate: Tensor | None,
    constant: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    out: Tensor,
) -> None:
    """residual, out [B, N, D] and x [A, N, D], each with rows at one distance; vectors [D] contiguous."""
    residual, x, out = as_rows(residual), as_rows(x), as_rows(out)
    width = x.shape[1]
    block_rows, block_width = row_tile(width)
    _add_layer_norm_modulate[(triton.cdiv(len(residual), block_rows),)](
        residual,
        x,
        gate,
        constant,
        shift,
        scale,
        out,
        len(residual),
        len(residual) - len(x),
        residual.stride(0),
        x.stride(0),
        out.stride(0),
        eps,
        width=width,
        block_rows=block_rows,
        block_width=block_width,
        **options(row_warps(width)),
    )
