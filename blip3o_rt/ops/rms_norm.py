"""RMSNorm of rows, optionally adding into the residual stream first."""

from __future__ import annotations

import torch
from torch import Tensor

from blip3o_rt.ops import native
from blip3o_rt.ops.registry import FLOATS, op, weight_dtype_matches
from blip3o_rt.ops.rounding import arithmetic_dtype, deliver


@op(tolerance={torch.float32: 1e-6, torch.bfloat16: 1e-6})
def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """y / sqrt(mean(y^2) + eps) * weight + bias over the last dimension, y = x or the updated residual.

    x [..., D], weight [D], bias [D] -> [..., D] in the dtype of x. With a residual [..., D], `residual += x`
    happens in place first (rounded to its dtype), and y is that sum. `out` receives the result; it may be x.
    """
    wide = arithmetic_dtype(x)
    y = x.to(wide)
    if residual is not None:
        residual.copy_(residual.to(wide) + y)
        y = residual.to(wide)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight.to(wide)
    if bias is not None:
        y = y + bias.to(wide)
    return deliver(y, x.dtype, out)


@rms_norm.implementation(
    "cuda", device="cuda", dtypes=FLOATS, supports=weight_dtype_matches, available=native.cuda_unavailable
)
def _cuda(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    native.cuda().rms_norm(x, weight, eps, bias=bias, residual=residual, out=out)
    return out


@rms_norm.implementation(
    "cpu", device="cpu", dtypes=FLOATS, supports=weight_dtype_matches, available=native.cpu_unavailable
)
def _cpu(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype) if out is None else out
    native.cpu().rms_norm(x, weight, eps, bias=bias, residual=residual, out=out)
    return out
