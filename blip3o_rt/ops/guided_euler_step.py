"""Classifier-free guidance and one Euler step of the latent, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from blip3o_rt.ops import triton_backend
from blip3o_rt.ops.registry import op
from blip3o_rt.ops.rounding import arithmetic_dtype, deliver


@op(tolerance={torch.float32: 1e-6})
def guided_euler_step(
    latent: Tensor,
    prediction: Tensor,
    guidance_scale: Tensor,
    delta_sigma: Tensor,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """latent + delta_sigma * (null + guidance_scale * (conditional - null)) -> [1, C, H, W] fp32.

    latent fp32 [1, C, H, W], prediction fp32 [2, C, H, W] = (null, conditional) (either may be a strided part
    of a larger tensor), guidance_scale and delta_sigma fp32 scalars (tensors, so that a recorded step can be
    run again with other values). `out` may be latent. (Guidance: arXiv 2207.12598.)
    """
    wide = arithmetic_dtype(latent)
    null, conditional = prediction.to(wide).split(1)
    guided = null + guidance_scale.to(wide) * (conditional - null)
    return deliver(latent + delta_sigma.to(wide) * guided, latent.dtype, out)


def _triton_supports(
    latent: Tensor,
    prediction: Tensor,
    guidance_scale: Tensor,
    delta_sigma: Tensor,
    *,
    out: Tensor | None = None,
) -> str | None:
    triton_backend.check_shapes(
        "guided_euler_step",
        latent=(latent, (1, *latent.shape[1:])),
        prediction=(prediction, (2, *latent.shape[1:])),
        guidance_scale=(guidance_scale, ()),
        delta_sigma=(delta_sigma, ()),
        out=(out, latent.shape),
    )
    tensors = (latent, prediction, guidance_scale, delta_sigma, *([] if out is None else [out]))
    if any(tensor.dtype != torch.float32 or tensor.device != latent.device for tensor in tensors):
        return "takes fp32 tensors on one device"
    return None


@guided_euler_step.implementation(
    "triton",
    device="cuda",
    dtypes=(torch.float32,),
    supports=_triton_supports,
    available=triton_backend.unavailable,
)
def _triton(
    latent: Tensor,
    prediction: Tensor,
    guidance_scale: Tensor,
    delta_sigma: Tensor,
    *,
    out: Tensor | None = None,
) -> Tensor:
    out = torch.empty(latent.shape, dtype=latent.dtype, device=latent.device) if out is None else out
    triton_backend.kernel("guided_euler_step")(latent, prediction, guidance_scale, delta_sigma, out)
    return out
