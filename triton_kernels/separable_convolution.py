"""A depthwise convolution, then a 1 x 1 convolution of groups of channels, pixels channels last.

Tiling   a program per group of channels, 64 pixels in the order of memory, and image. The pixels' neighbors
         are read tap by tap, mostly from the caches, and added up in registers. The sums are the left side of
         a product with the group's matrix.
Bytes    x and out once, 4 per element in bfloat16: the taps of a pixel overlap with those of its neighbors.
         The nine calls for an image of 1024 pixels move 0.5 GB.
FLOPs    2 k^2 + 2 G per element: 50 on the arithmetic units for 5 x 5 taps, 64 on the matrix units for groups
         of 32 channels.
Bound    the loads of taps from the first-level cache (k^2 per element), then memory.
To tune  the pixels of a program; rows that stay in registers while a program walks down.
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import options

BLOCK_PIXELS = 64


@triton.jit
def _separable_convolution(
    x,
    depth,
    point,
    out,
    height,
    width,
    channels: tl.constexpr,
    side: tl.constexpr,
    group: tl.constexpr,
    block_pixels: tl.constexpr,
):
    pixel = tl.program_id(1) * block_pixels + tl.arange(0, block_pixels)
    row, column = pixel // width, pixel % width
    input = tl.arange(0, group)
    channel = tl.program_id(0) * group + input
    image = tl.program_id(2).to(tl.int64) * height * width * channels
    place = pixel[:, None] * channels + channel[None, :]
    sums = tl.zeros((block_pixels, group), tl.float32)
    for down in range(side):
        for right in range(side):
            rows, columns = row + (down - side // 2), column + (right - side // 2)
            inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
            shift = ((down - side // 2) * width + (right - side // 2)) * channels
            value = tl.load(x + image + (place + shift), mask=inside[:, None], other=0.0).to(tl.float32)
            tap = tl.load(depth + channel * (side * side) + (down * side + right)).to(tl.float32)
            sums += value * tap[None, :]
    matrix = tl.load(point + channel[None, :] * group + input[:, None])  # [input, output]
    result = tl.dot(sums.to(matrix.dtype), matrix, input_precision="ieee")
    tl.store(out + image + place, result.to(out.dtype.element_ty), mask=(pixel < height * width)[:, None])


def separable_convolution(x: Tensor, depth: Tensor, point: Tensor, out: Tensor) -> None:
    """x and out [B, H, W, C], depth [C, k, k, 1], point [C, 1, 1, G], contiguous.

    G is a power of two from 16 on. An image has fewer than 2^31 elements.
    """
    batch, height, width, channels = x.shape
    group = point.shape[-1]
    grid = channels // group, triton.cdiv(height * width, BLOCK_PIXELS), batch
    _separable_convolution[grid](
        x,
        depth,
        point,
        out,
        height,
        width,
        channels=channels,
        side=depth.shape[1],
        group=group,
        block_pixels=BLOCK_PIXELS,
        **options(num_warps=4),
    )
