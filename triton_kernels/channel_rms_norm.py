"""RMSNorm over the channels of pixels: x / sqrt(mean(x^2) + eps) * weight + bias + residual, and a ReLU.

Tiling   a program per tile of whole pixels (32 of 128 channels, 4 of 1024), held in registers.
Bytes    per element: x and residual once, out once; for bfloat16 6.
FLOPs    6 per element.
Bound    memory.
To tune  With 256 channels and more, weight and bias change their layout through shared memory, 7 to 17
         barriers a program.
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import as_rows, options, row_tile, row_warps


@triton.jit
def _channel_rms_norm(
    x,
    weight,
    bias,
    residual,
    out,
    rows,
    eps,
    relu: tl.constexpr,
    width: tl.constexpr,
    block_rows: tl.constexpr,
    block_width: tl.constexpr,
):
    row = (tl.program_id(0) * block_rows + tl.arange(0, block_rows)).to(tl.int64)[:, None]
    column = tl.arange(0, block_width)[None, :]
    inside = (row < rows) & (column < width)
    place = row * width + column
    y = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    y *= (1.0 / tl.sqrt(tl.sum(y * y, axis=1) / width + eps))[:, None]
    y *= tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    y += tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)
    if residual is not None:
        y += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    if relu:
        y = tl.where(y < 0, 0.0, y)  # keeps NaN, which a maximum drops
    tl.store(out + place, y.to(out.dtype.element_ty), mask=inside)


def channel_rms_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None, relu: bool, out: Tensor
) -> None:
    """x, residual and out [..., C], weight and bias [C], all contiguous; out may be x or the residual."""
    rows = as_rows(x)
    block_rows, block_width = row_tile(rows.shape[1])
    _channel_rms_norm[(triton.cdiv(len(rows), block_rows),)](
        x,
        weight,
        bias,
        residual,
        out,
        len(rows),
        eps,
        relu=relu,
        width=rows.shape[1],
        block_rows=block_rows,
        block_width=block_width,
        **options(row_warps(rows.shape[1])),
    )
