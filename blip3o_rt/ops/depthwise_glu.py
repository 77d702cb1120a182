"""The middle of SANA's feed-forward: bias, SiLU, depthwise 3x3 convolution, bias and gate, channels last."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from blip3o_rt.ops import native, triton_backend
from blip3o_rt.ops.registry import FLOATS, op
from blip3o_rt.ops.rounding import arithmetic_dtype

CPU_CHANNELS = 256  # channels at a time on the CPU, so that the fp32 intermediates stay in cache


@op(tolerance={torch.float32: 1e-5, torch.bfloat16: 1e-5})  # sums of nine products
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
        value = _convolved(x, input_bias, weight, bias, value_range)
        gate = _convolved(x, input_bias, weight, bias, gate_range)
        out[..., value_range].copy_(value.mul_(F.silu(gate, inplace=True)))
    return out


def _convolved(x: Tensor, input_bias: Tensor, weight: Tensor, bias: Tensor, channels: slice) -> Tensor:
    wide = arithmetic_dtype(x)
    activated = F.silu(x[..., channels].to(wide) + input_bias[channels].to(wide), inplace=True)
    planes = activated.permute(0, 3, 1, 2)
    result = F.conv2d(
        planes, weight[channels].to(wide), bias[channels].to(wide), padding=1, groups=planes.shape[1]
    )
    return result.permute(0, 2, 3, 1)


def _triton_supports(
    x: Tensor, input_bias: Tensor, weight: Tensor, bias: Tensor, *, out: Tensor | None = None
) -> str | None:
    channels = x.shape[-1]
    triton_backend.check_shapes(
        "depthwise_glu",
        input_bias=(input_bias, (channels,)),
        weight=(weight, (channels, 1, 3, 3)),
        bias=(bias, (channels,)),
        out=(out, (*x.shape[:-1], channels // 2)),
    )
    if channels > 1 and x.stride(-1) != 1:
        return "takes x with contiguous channels"
    if x.shape[1] * x.stride(1) >= 2**31:
        return "takes pictures that span fewer than 2^31 elements"
    return triton_backend.takes_contiguous(input_bias=input_bias, weight=weight, bias=bias, out=out)


@depthwise_glu.implementation(
    "triton",
    device="cuda",
    dtypes=FLOATS,
    supports=_triton_supports,
    available=triton_backend.unavailable,
)
def _triton(
    x: Tensor, input_bias: Tensor, weight: Tensor, bias: Tensor, *, out: Tensor | None = None
) -> Tensor:
    out = x.new_empty((*x.shape[:-1], x.shape[-1] // 2)) if out is None else out
    triton_backend.kernel("depthwise_glu")(x, input_bias, weight, bias, out)
    return out


def _one_dtype(x: Tensor, input_bias: Tensor, weight: Tensor, bias: Tensor, **_: Any) -> str | None:
    """The support of an implementation for weight and biases in the dtype of x."""
    same = all(other.dtype == x.dtype for other in (input_bias, weight, bias))
    return None if same else "takes x, weight and biases of one dtype"


@depthwise_glu.implementation(
    "cpu", device="cpu", dtypes=FLOATS, supports=_one_dtype, available=native.cpu_unavailable
)
def _cpu(x: Tensor, input_bias: Tensor, weight: Tensor, bias: Tensor, *, out: Tensor | None = None) -> Tensor:
    out = torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=x.dtype) if out is None else out
    native.cpu().depthwise_glu(x, input_bias, weight, bias, out=out)
    return out
