"""Ops on images held channels last, and the image tokenizer's quantizer."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from blip3o_rt.ops import triton_backend
from blip3o_rt.ops.dtypes import FLOATS, cast_out, compute_dtype
from blip3o_rt.ops.registry import op, same_dtype
from blip3o_rt.ops.triton_backend import takes_contiguous

__all__ = [
    "add_pixel_shuffle",
    "add_pixel_unshuffle",
    "convolution_silu",
    "depthwise_glu",
    "nearest_code",
    "separable_convolution",
]

CPU_CHANNELS = 256  # channels at a time on the CPU, so that the fp32 intermediates stay in cache
MOST_ELEMENTS = 2**31 - 2**16  # of an image whose elements a launch counts in 32 bits
GROUPS_OF = (16, 32, 64, 128)  # channels that a tile of the matrix units covers
ROUNDED_TWICE = 2.0**-7  # where the SiLU is a pass of its own, the sums behind it are rounded to bfloat16
CODE_ROWS = 64  # rows at a time, so that the scores of a large codebook stay small


@op(
    "x [B, H, W, 2 C], input_bias [2 C], weight [2 C, 1, 3, 3], bias [2 C] -> [B, H, W, C]",
    tolerance=1e-5,  # sums of nine products
)
def depthwise_glu(
    x: Tensor, input_bias: Tensor, weight: Tensor, bias: Tensor, *, out: Tensor | None = None
) -> Tensor:
    """value * silu(gate), (value | gate) = depthwise_conv3x3(silu(x + input_bias)) + bias.

    x [B, H, W, 2 C], input_bias and bias [2 C], weight [2 C, 1, 3, 3] -> [B, H, W, C] in the dtype of x. The
    convolution pads the activated image with one pixel of zeros.
    """
    channels = x.shape[-1] // 2
    out = x.new_empty((*x.shape[:-1], channels)) if out is None else out
    step = CPU_CHANNELS if x.device.type == "cpu" else channels
    for first in range(0, channels, step):
        value_range = slice(first, min(first + step, channels))
        gate_range = slice(channels + value_range.start, channels + value_range.stop)
        value = _depthwise(x, input_bias, weight, bias, value_range)
        gate = _depthwise(x, input_bias, weight, bias, gate_range)
        out[..., value_range].copy_(value.mul_(F.silu(gate, inplace=True)))
    return out


def _depthwise(x: Tensor, input_bias: Tensor, weight: Tensor, bias: Tensor, channels: slice) -> Tensor:
    dtype = compute_dtype(x)
    activated = F.silu(x[..., channels].to(dtype) + input_bias[channels].to(dtype), inplace=True)
    planes = activated.permute(0, 3, 1, 2)
    result = F.conv2d(
        planes, weight[channels].to(dtype), bias[channels].to(dtype), padding=1, groups=planes.shape[1]
    )
    return result.permute(0, 2, 3, 1)


def _fewer_than_31_bits(call: Any) -> str | None:
    if call.x.shape[-1] > 1 and call.x.stride(-1) != 1:
        return "takes x with contiguous channels"
    if call.x.shape[1] * call.x.stride(1) >= 2**31:
        return "takes images that span fewer than 2^31 elements"
    return takes_contiguous(call, "input_bias", "weight", "bias", "out")


depthwise_glu.triton(dtypes=FLOATS, supports=_fewer_than_31_bits)
depthwise_glu.native("cpu", dtypes=FLOATS, supports=same_dtype("x", "input_bias", "weight", "bias"))


@op(
    "x [B, H, W, C], weight [D, k, k, C], bias [D] -> [B, H, W, D]",
    tolerance={torch.float32: 1e-5, torch.bfloat16: ROUNDED_TWICE},
)
def convolution_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """silu(conv(x, weight) + bias), the size kept, over images channels last.

    x [B, H, W, C] contiguous, weight [D, k, k, C] (k odd) contiguous, bias [D] -> [B, H, W, D] contiguous in
    the dtype of x, which weight and bias have too. The image is padded with zeros.
    """
    return F.silu(_convolved(x, weight, bias), inplace=True)


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    planes = F.conv2d(x.permute(0, 3, 1, 2), weight.permute(0, 3, 1, 2), bias, padding=weight.shape[1] // 2)
    return planes.permute(0, 2, 3, 1).contiguous()


def _contiguous_convolution(call: Any) -> str | None:
    return takes_contiguous(call, "x", "weight", "bias")


@convolution_silu.implementation(
    "triton",
    device="cuda",
    dtypes=FLOATS,
    supports=_contiguous_convolution,
    available=triton_backend.unavailable,
)
def _convolution_and_triton(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """cuDNN's convolution; a bias there would be a pass of its own, and goes into that of the SiLU."""
    convolved = _convolved(x, weight, None)
    triton_backend.kernel("convolution_silu")(convolved, bias)
    return convolved


def onednn_unavailable() -> str | None:
    """None if torch has its convolutions with an activation at their end, else why not."""
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
        return None
    return "this PyTorch is built without oneDNN; install one from pytorch.org"


@functools.cache
def _no_bfloat16_of_onednn() -> str | None:
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    return "oneDNN has no convolution in bfloat16 for this processor"


@convolution_silu.implementation(
    "onednn",
    device="cpu",
    dtypes=FLOATS,
    available=onednn_unavailable,
    needs={torch.bfloat16: _no_bfloat16_of_onednn},
)
def _onednn(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The SiLU at the end of oneDNN's convolution, before its sums are rounded."""
    side, ones = weight.shape[1], (1, 1)
    planes = torch.ops.mkldnn._convolution_pointwise(
        x.permute(0, 3, 1, 2),
        weight.permute(0, 3, 1, 2),
        bias,
        (side // 2, side // 2),
        ones,
        ones,
        1,
        "swish",
        (),
        "",
    )
    return planes.permute(0, 2, 3, 1).contiguous()


@op(
    "x [B, H, W, C], depth [C, k, k, 1], point [C, 1, 1, G] -> [B, H, W, C]",
    tolerance={torch.float32: 1e-5, torch.bfloat16: ROUNDED_TWICE},
)
def separable_convolution(x: Tensor, depth: Tensor, point: Tensor, *, out: Tensor | None = None) -> Tensor:
    """A depthwise convolution, the size kept, then a 1 x 1 convolution of groups of channels.

    x [B, H, W, C] contiguous, depth [C, k, k, 1] (k odd), point [C, 1, 1, G] of groups of G channels, both
    contiguous -> [B, H, W, C] contiguous in the dtype of x. The image is padded with zeros. What is between
    the two convolutions is rounded to the dtype of x.
    """
    side, groups = depth.shape[1], len(point) // point.shape[-1]
    planes, taps, matrix = (tensor.permute(0, 3, 1, 2) for tensor in (x, depth, point))
    between = F.conv2d(planes, taps, padding=side // 2, groups=len(depth)).permute(0, 2, 3, 1).contiguous()
    result = F.conv2d(between.permute(0, 3, 1, 2), matrix, groups=groups).permute(0, 2, 3, 1).contiguous()
    return cast_out(result, x.dtype, out)


def _groups_of_a_tile(call: Any) -> str | None:
    if call.point.shape[-1] not in GROUPS_OF:
        return f"takes groups of {', '.join(map(str, GROUPS_OF))} channels"
    if call.x[:1].numel() > MOST_ELEMENTS:
        return f"takes images of at most {MOST_ELEMENTS} elements"
    return takes_contiguous(call, "x", "depth", "point", "out")


separable_convolution.triton(dtypes=FLOATS, supports=_groups_of_a_tile)


@op("x [B, H, W, C], result [B, 2 H, 2 W, D], bias [D] -> result", tolerance=1e-6)
def add_pixel_shuffle(result: Tensor, x: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """result += pixel_shuffle(x, channels repeated) + bias, in place, rounded once; returns result.

    x [B, H, W, C], result [B, 2 H, 2 W, D], 4 D a multiple of C, bias [D] or None. Channel c at corner (row,
    column) of a doubled pixel takes input channel (4 c + 2 row + column) * C // (4 D).
    """
    dtype = compute_dtype(result)
    channels = 4 * torch.arange(result.shape[-1], device=x.device)
    repeats = 4 * result.shape[-1] // x.shape[-1]
    for corner in range(4):
        row, column = divmod(corner, 2)
        corner_pixels = result[:, row::2, column::2]
        added = x if repeats == 4 else x.index_select(3, (channels + corner) // repeats)
        total = corner_pixels.to(dtype) + added
        corner_pixels.copy_(total if bias is None else total.add_(bias))
    return result


def _shuffled(call: Any) -> str | None:
    if 4 * call.result.shape[-1] % call.x.shape[-1]:
        return "takes four times the channels of result as a multiple of those of x"
    return _small_images(call, call.result)


def _small_images(call: Any, larger: Tensor) -> str | None:
    if larger.numel() > MOST_ELEMENTS:
        return f"takes images of at most {MOST_ELEMENTS} elements"
    return takes_contiguous(call, "result", "x", "bias")


add_pixel_shuffle.triton(dtypes=FLOATS, supports=_shuffled)
add_pixel_shuffle.native("cpu", dtypes=FLOATS, supports=same_dtype("result", "x", "bias"))


@op("result [B, H, W, D], x [B, 2 H, 2 W, C], bias [D] -> result", tolerance=1e-6)
def add_pixel_unshuffle(result: Tensor, x: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """result += the means of groups of channels of pixel_unshuffle(x) + bias, in place; returns result.

    x [B, 2 H, 2 W, C], result [B, H, W, D], 4 C a multiple of D, bias [D] or None. Unshuffled, a pixel has
    4 C channels, 4 c + 2 row + column of corner (row, column); D groups of consecutive ones are averaged. The
    sum is rounded once.
    """
    dtype = compute_dtype(result)
    unshuffled = F.pixel_unshuffle(x.permute(0, 3, 1, 2), 2).unflatten(1, (result.shape[-1], -1))
    total = unshuffled.mean(2, dtype=dtype).permute(0, 2, 3, 1) + result
    return result.copy_(total if bias is None else total.add_(bias))


def _unshuffled(call: Any) -> str | None:
    if 4 * call.x.shape[-1] % call.result.shape[-1]:
        return "takes four times the channels of x as a multiple of those of result"
    return _small_images(call, call.x)


add_pixel_unshuffle.triton(dtypes=FLOATS, supports=_unshuffled)
add_pixel_unshuffle.native("cpu", dtypes=FLOATS, supports=same_dtype("result", "x", "bias"))


@op("features [N, D], codebook [C, D] -> [N]", tolerance={torch.float32: 2e-6}, out_dtype=torch.int64)
def nearest_code(features: Tensor, codebook: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Index of the codebook row with the largest dot product, the lowest on a tie.

    features float32 [N, D] (their length does not matter), codebook float32 [C, D] of unit rows -> int64 [N].
    The dot product of the row returned is within the tolerance (of the feature's length) of the largest.
    """
    codes = torch.cat([(rows @ codebook.T).argmax(dim=-1) for rows in features.split(CODE_ROWS)])
    return cast_out(codes, torch.int64, out)


nearest_code.native("cpu", dtypes=(torch.float32,))
