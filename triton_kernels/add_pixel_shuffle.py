"""The shortcut of an upsampling block: result += bias + pixel_shuffle(x, channels repeated), channels last.

Tiling   a program per 1024 elements of the result in the order of memory.
Bytes    per element of the result: read and written once, and its share of x from memory; with half as many
         channels as x has, in bfloat16 5.
FLOPs    1 per element.
Bound    memory.
To tune  With half the channels neighboring lanes read every second element of x, in 8 loads a thread; a
         program of coarse pixels would read it once, contiguously, and split it.
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import options

BLOCK = 1024


@triton.jit
def _add_pixel_shuffle(
    result,
    x,
    bias,
    elements,
    height,
    width,
    channels: tl.constexpr,
    wanted: tl.constexpr,
    block: tl.constexpr,
):
    """height and width are those of the result."""
    index = tl.program_id(0) * block + tl.arange(0, block)
    inside = index < elements
    channel, pixel = index % wanted, index // wanted
    column, row, image = pixel % width, pixel // width % height, pixel // (width * height)
    source = (4 * channel + (row & 1) * 2 + (column & 1)) // (4 * wanted // channels)
    coarse = (image * (height // 2) + (row >> 1)) * (width // 2) + (column >> 1)
    added = tl.load(x + coarse.to(tl.int64) * channels + source, mask=inside, other=0.0).to(tl.float32)
    total = tl.load(result + index, mask=inside, other=0.0).to(tl.float32) + added
    if bias is not None:
        total += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(result + index, total.to(result.dtype.element_ty), mask=inside)


def add_pixel_shuffle(result: Tensor, x: Tensor, bias: Tensor | None) -> None:
    """x [B, H, W, C], result [B, 2 H, 2 W, D] of fewer than 2^31 elements, bias [D] or None, contiguous."""
    _, height, width, wanted = result.shape
    _add_pixel_shuffle[(triton.cdiv(result.numel(), BLOCK),)](
        result,
        x,
        bias,
        result.numel(),
        height,
        width,
        channels=x.shape[3],
        wanted=wanted,
        block=BLOCK,
        **options(num_warps=4),
    )
