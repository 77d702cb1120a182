"""RMSNorm over the channels of an image held channels last, and the residual or the ReLU that follows it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from blip3o_rt.ops import native, triton_backend
from blip3o_rt.ops.registry import FLOATS, op
from blip3o_rt.ops.rounding import arithmetic_dtype

CPU_ELEMENTS = 2**18  # at a time, so that the wide intermediates stay in cache
OTHER_ELEMENTS = 2**25  # at a time, so that those of a full-resolution picture stay small


@op(tolerance={torch.float32: 1e-6, torch.bfloat16: 1e-6})
def channel_rms_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    relu: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight + bias + residual over the last dimension, then ReLU if asked.

    x [..., C] contiguous, weight and bias [C], residual [..., C] or None -> [..., C] in the dtype of x. `out`
    receives the result; it may be x or the residual.
    """
    wide = arithmetic_dtype(x)
    scale, shift = weight.to(wide), bias.to(wide)
    out = torch.empty_like(x) if out is None else out
    elements = CPU_ELEMENTS if x.device.type == "cpu" else OTHER_ELEMENTS
    step = max(1, elements // x.shape[-1])
    rows, results = x.view(-1, x.shape[-1]).split(step), out.view(-1, x.shape[-1]).split(step)
    added = None if residual is None else residual.view(-1, x.shape[-1]).split(step)
    for index, (row, result) in enumerate(zip(rows, results, strict=True)):
        y = row.to(wide)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True).add_(eps))
        y.mul_(scale).add_(shift)
        if added is not None:
            y.add_(added[index])
        if relu:
            y.relu_()
        result.copy_(y)
    return out


def _triton_supports(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    relu: bool = False,
    out: Tensor | None = None,
) -> str | None:
    channels = x.shape[-1:]
    triton_backend.check_shapes(
        "channel_rms_norm",
        weight=(weight, channels),
        bias=(bias, channels),
        residual=(residual, x.shape),
        out=(out, x.shape),
    )
    return triton_backend.takes_rows(x=x) or triton_backend.takes_contiguous(
        x=x, weight=weight, bias=bias, residual=residual, out=out
    )


@channel_rms_norm.implementation(
    "triton",
    device="cuda",
    dtypes=FLOATS,
    supports=_triton_supports,
    available=triton_backend.unavailable,
)
def _triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    relu: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    out = torch.empty_like(x) if out is None else out
    triton_backend.kernel("channel_rms_norm")(x, weight, bias, eps, residual, relu, out)
    return out


def _one_dtype(
    x: Tensor, weight: Tensor, bias: Tensor, *_: Any, residual: Tensor | None = None, **__: Any
) -> str | None:
    """The support of an implementation for weight, bias and residual in the dtype of x."""
    same = all(other is None or other.dtype == x.dtype for other in (weight, bias, residual))
    return None if same else "takes x, weight, bias and residual of one dtype"


@channel_rms_norm.implementation(
    "cpu", device="cpu", dtypes=FLOATS, supports=_one_dtype, available=native.cpu_unavailable
)
def _cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    relu: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    out = torch.empty_like(x) if out is None else out
    native.cpu().channel_rms_norm(x, weight, bias, eps, residual=residual, relu=relu, out=out)
    return out
