"""The first convolution of a residual block, and the SiLU behind it."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from blip3o_rt.ops import triton_backend
from blip3o_rt.ops.registry import FLOATS, op

ROUNDED_TWICE = 2.0**-7  # where the SiLU is a pass of its own, the sums behind it are rounded to bfloat16


@op(tolerance={torch.float32: 1e-5, torch.bfloat16: ROUNDED_TWICE})
def convolution_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """silu(conv(x, weight) + bias), the size kept, over images channels last.

    x [B, H, W, C] contiguous, weight [D, k, k, C] (k odd) contiguous, bias [D] -> [B, H, W, D] contiguous in
    the dtype of x, which weight and bias have too. The image is padded with zeros.
    """
    return F.silu(_convolved(x, weight, bias), inplace=True)


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    planes = F.conv2d(x.permute(0, 3, 1, 2), weight.permute(0, 3, 1, 2), bias, padding=weight.shape[1] // 2)
    return planes.permute(0, 2, 3, 1).contiguous()


def _triton_supports(x: Tensor, weight: Tensor, bias: Tensor) -> str | None:
    side, channels = weight.shape[1], x.shape[-1]
    triton_backend.check_shapes(
        "convolution_silu",
        weight=(weight, (len(weight), side, side, channels)),
        bias=(bias, (len(weight),)),
    )
    return triton_backend.takes_contiguous(x=x, weight=weight, bias=bias)


@convolution_silu.implementation(
    "triton",
    device="cuda",
    dtypes=FLOATS,
    supports=_triton_supports,
    available=triton_backend.unavailable,
)
def _triton(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """cuDNN's convolution; a bias there would be a pass of its own, and goes into that of the SiLU."""
    convolved = _convolved(x, weight, None)
    triton_backend.kernel("convolution_silu")(convolved, bias)
    return convolved


def onednn_unavailable() -> str | None:
    """None if torch has its convolutions with an activation at their end, else why not."""
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
        return None
    return "this PyTorch is built without oneDNN; install one from pytorch.org"


def _onednn_supports(x: Tensor, weight: Tensor, bias: Tensor) -> str | None:
    if x.dtype == torch.bfloat16 and not _onednn_takes_bfloat16():
        return "takes float32, got bfloat16: oneDNN has no convolution in it for this processor"
    return None


@functools.cache
def _onednn_takes_bfloat16() -> bool:
    """Whether oneDNN has convolutions in bfloat16 on this processor."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@convolution_silu.implementation(
    "onednn", device="cpu", dtypes=FLOATS, supports=_onednn_supports, available=onednn_unavailable
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
