"""value * silu(gate), (value | gate) = depthwise_conv3x3(silu(x + input_bias)) + bias, pixels channels last.

Tiling   a program per image, strip of columns, block of channels and band of rows. It walks down its band:
         a row of the strip and its two shifted copies are loaded and activated once, and go into the sums of
         the three output rows that they touch, which are kept in registers. Lanes beyond the image are zeros
         (the padding is of the activated image), lanes beyond the channels are masked.
Bytes    x once from memory and twice more from the caches (plus two rows a band), out once: in bfloat16 6 per
         output element, 69 MB for 2 x 32 x 32 pixels of 2 x 5600 channels.
FLOPs    36 per output element for the sums, and 3 activations of each input element.
Bound    the special function units (4 per 3 activations, 10 per output element: some 32 us for the pixels
         above on an H200, whose memory would take 17), then memory.
To tune  168 registers leave 12 warps on a multiprocessor (8 warps a program, the next row loaded ahead); an
         activated row handed to its neighbors through shared memory (tl.gather), or two columns a lane,
         instead of three activations; the strip, the channels and the band.
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import options

BLOCK_COLUMNS, BLOCK_CHANNELS, BAND_ROWS = 16, 32, 16


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _pixels(row_place, column, shift, offset, inside_row, width, pixel, bias, known):
    """x + bias of a row's pixels `shift` columns away, with 1 + e^-x of it, and where the image has them.

    Below -28 SiLU is as good as 0 (2e-11), and the product of three such denominators is still a number.
    """
    inside = inside_row & (column + shift >= 0) & (column + shift < width)
    mask = inside[:, None] & known[None, :]
    x = tl.load(row_place + (column + shift)[:, None] * pixel + offset[None, :], mask=mask, other=0.0)
    x = x.to(tl.float32) + bias[None, :]
    return x, 1.0 + tl.exp(tl.minimum(-x, 28.0)), mask


@triton.jit
def _activated(row_place, column, offset, inside_row, width, pixel, bias, known):
    """silu(x + bias) of a row's pixels one to the left, there, and one to the right; zero outside the image.

    One reciprocal serves all three.
    """
    a, a_below, a_inside = _pixels(row_place, column, -1, offset, inside_row, width, pixel, bias, known)
    b, b_below, b_inside = _pixels(row_place, column, 0, offset, inside_row, width, pixel, bias, known)
    c, c_below, c_inside = _pixels(row_place, column, 1, offset, inside_row, width, pixel, bias, known)
    inverse = 1.0 / (a_below * b_below * c_below)
    left = tl.where(a_inside, a * (inverse * (b_below * c_below)), 0.0)
    middle = tl.where(b_inside, b * (inverse * (a_below * c_below)), 0.0)
    right = tl.where(c_inside, c * (inverse * (a_below * b_below)), 0.0)
    return left, middle, right


@triton.jit
def _taps(weight, channel, known, row: tl.constexpr):
    """The three taps of one row of the kernels of some channels, [1, channels] each."""
    place = weight + channel * 9 + row * 3
    left = tl.load(place, mask=known, other=0.0).to(tl.float32)
    middle = tl.load(place + 1, mask=known, other=0.0).to(tl.float32)
    right = tl.load(place + 2, mask=known, other=0.0).to(tl.float32)
    return left[None, :], middle[None, :], right[None, :]


@triton.jit
def _depthwise_glu(
    x,
    input_bias,
    weight,
    bias,
    out,
    height,
    width,
    x_batch,
    x_row,
    x_pixel,
    channels: tl.constexpr,
    block_columns: tl.constexpr,
    block_channels: tl.constexpr,
    band_rows: tl.constexpr,
):
    strips = tl.cdiv(width, block_columns)
    column = tl.program_id(1) % strips * block_columns + tl.arange(0, block_columns)
    band = tl.program_id(1) // strips * band_rows
    batch = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(0) * block_channels + tl.arange(0, block_channels)
    known = channel < channels
    gate = channels + channel
    value_bias = tl.load(input_bias + channel, mask=known, other=0.0).to(tl.float32)
    gate_bias = tl.load(input_bias + gate, mask=known, other=0.0).to(tl.float32)
    v00, v01, v02 = _taps(weight, channel, known, 0)
    v10, v11, v12 = _taps(weight, channel, known, 1)
    v20, v21, v22 = _taps(weight, channel, known, 2)
    g00, g01, g02 = _taps(weight, gate, known, 0)
    g10, g11, g12 = _taps(weight, gate, known, 1)
    g20, g21, g22 = _taps(weight, gate, known, 2)
    value_start = tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)[None, :]
    gate_start = tl.load(bias + gate, mask=known, other=0.0).to(tl.float32)[None, :]
    # The sums of the row above the one being read, which it completes, and of that row itself.
    value_above = tl.zeros((block_columns, block_channels), tl.float32) + value_start
    gate_above = tl.zeros((block_columns, block_channels), tl.float32) + gate_start
    value_here, gate_here = value_above, gate_above
    for row in range(band - 1, min(band + band_rows, height) + 1):
        rows = tl.full((block_columns,), 0, tl.int32) + row
        inside_row = (rows >= 0) & (rows < height)
        place = x + (batch * x_batch + row * x_row)
        left, middle, right = _activated(
            place, column, channel, inside_row, width, x_pixel, value_bias, known
        )
        value = value_above + left * v20 + middle * v21 + right * v22
        value_above = value_here + left * v10 + middle * v11 + right * v12
        value_here = value_start + left * v00 + middle * v01 + right * v02
        left, middle, right = _activated(place, column, gate, inside_row, width, x_pixel, gate_bias, known)
        gated = gate_above + left * g20 + middle * g21 + right * g22
        gate_above = gate_here + left * g10 + middle * g11 + right * g12
        gate_here = gate_start + left * g00 + middle * g01 + right * g02
        written = (rows > band) & (column < width)
        target = ((batch * height + row - 1) * width + column.to(tl.int64))[:, None] * channels
        result = (value * _silu(gated)).to(out.dtype.element_ty)
        tl.store(out + target + channel[None, :], result, mask=written[:, None] & known[None, :])


def depthwise_glu(x: Tensor, input_bias: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
    """x [B, H, W, 2 C] with contiguous channels; biases [2 C], weight [2 C, 1, 3, 3], out, contiguous.

    An image spans fewer than 2^31 elements.
    """
    batch, height, width, channels = out.shape
    strips, bands = triton.cdiv(width, BLOCK_COLUMNS), triton.cdiv(height, BAND_ROWS)
    _depthwise_glu[(triton.cdiv(channels, BLOCK_CHANNELS), strips * bands, batch)](
        x,
        input_bias,
        weight,
        bias,
        out,
        height,
        width,
        *x.stride()[:3],
        channels=channels,
        block_columns=BLOCK_COLUMNS,
        block_channels=BLOCK_CHANNELS,
        band_rows=BAND_ROWS,
        **options(num_warps=4),
    )
