"""The shortcut of a downsampling block: result += bias + means of groups of pixel_unshuffle(x)'s channels.

Tiling   a program per 1024 elements of the result in the order of memory.
Bytes    per element of the result: read and written once, and the elements of x that it averages; with twice
         as many channels as x has, in bfloat16 8.
FLOPs    1 per element of x.
Bound    memory.
To tune  The block, and whether the reads of x, which neighboring lanes share, all come from the first-level
         cache.
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import options

BLOCK = 1024


@triton.jit
def _add_pixel_unshuffle(
    result,
    x,
    bias,
    elements,
    width,
    channels: tl.constexpr,
    wanted: tl.constexpr,
    block: tl.constexpr,
):
    """width is the result's."""
    index = tl.program_id(0) * block + tl.arange(0, block)
    inside = index < elements
    channel, pixel = index % wanted, index // wanted
    column, row = pixel % width, pixel // width  # rows of all images, one below the other
    corner = (row.to(tl.int64) * 4 * width + 2 * column) * channels
    group: tl.constexpr = 4 * channels // wanted
    total = tl.zeros((block,), tl.float32)
    for member in tl.static_range(group):
        source = channel * group + member
        # Shifts: a division of numbers that might be negative is three instructions more.
        place = corner + ((source >> 1 & 1) * 2 * width + (source & 1)) * channels + (source >> 2)
        total += tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    total = total / group + tl.load(result + index, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        total += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(result + index, total.to(result.dtype.element_ty), mask=inside)


def add_pixel_unshuffle(result: Tensor, x: Tensor, bias: Tensor | None) -> None:
    """result [B, H, W, D], x [B, 2 H, 2 W, C] of fewer than 2^31 elements, bias [D] or None, contiguous."""
    width, wanted = result.shape[2:]
    _add_pixel_unshuffle[(triton.cdiv(result.numel(), BLOCK),)](
        result,
        x,
        bias,
        result.numel(),
        width,
        channels=x.shape[3],
        wanted=wanted,
        block=BLOCK,
        **options(num_warps=4),
    )
