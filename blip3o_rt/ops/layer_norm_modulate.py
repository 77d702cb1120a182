"""LayerNorm without weights of its own, scaled and shifted by vectors that the timestep gives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from blip3o_rt.ops import native, triton_backend
from blip3o_rt.ops.registry import FLOATS, op
from blip3o_rt.ops.rounding import arithmetic_dtype, deliver


@op(tolerance={torch.float32: 1e-5, torch.bfloat16: 1e-5})  # subtracting the mean cancels digits
def layer_norm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, *, out: Tensor | None = None
) -> Tensor:
    """(x - mean(x)) / sqrt(var(x) + eps) * (1 + scale) + shift over the last dimension (var: biased).

    x [..., D], shift and scale [D] (fp32, or the dtype of x) -> [..., D] in the dtype of x, or in that of
    `out`, which may be fp32 for bf16 x.
    """
    wide = arithmetic_dtype(x)
    y = F.layer_norm(x.to(wide), x.shape[-1:], 1 + scale.to(wide), shift.to(wide), eps)
    return deliver(y, x.dtype, out)


def _triton_supports(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, *, out: Tensor | None = None
) -> str | None:
    width = x.shape[-1:]
    triton_backend.check_shapes(
        "layer_norm_modulate", shift=(shift, width), scale=(scale, width), out=(out, x.shape)
    )
    return triton_backend.takes_rows(x=x, out=out) or triton_backend.takes_contiguous(
        shift=shift, scale=scale
    )


@layer_norm_modulate.implementation(
    "triton",
    device="cuda",
    dtypes=FLOATS,
    supports=_triton_supports,
    available=triton_backend.unavailable,
)
def _triton(x: Tensor, shift: Tensor, scale: Tensor, eps: float, *, out: Tensor | None = None) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    triton_backend.kernel("layer_norm_modulate")(x, shift, scale, eps, out)
    return out


def _modulation_dtype(x: Tensor, shift: Tensor, scale: Tensor, *_: Any, **__: Any) -> str | None:
    """The support of an implementation for shift and scale of one dtype, float32 or that of x."""
    same = shift.dtype == scale.dtype and shift.dtype in (torch.float32, x.dtype)
    return None if same else "takes shift and scale of one dtype, float32 or that of x"


@layer_norm_modulate.implementation(
    "cpu", device="cpu", dtypes=FLOATS, supports=_modulation_dtype, available=native.cpu_unavailable
)
def _cpu(x: Tensor, shift: Tensor, scale: Tensor, eps: float, *, out: Tensor | None = None) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype) if out is None else out
    native.cpu().layer_norm_modulate(x, shift, scale, eps, out=out)
    return out
