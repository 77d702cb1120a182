"""A sublayer's result added into the residual stream through a gate that the timestep gives."""

from __future__ import annotations

import torch
from torch import Tensor

from blip3o_rt.ops import native, triton_backend
from blip3o_rt.ops.registry import FLOATS, op
from blip3o_rt.ops.rounding import arithmetic_dtype


@op(tolerance={torch.float32: 1e-6, torch.bfloat16: 1e-6})
def gated_add(residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    """residual += gate * x, in place, rounded once; returns residual.

    residual and x [..., D], gate [D] (fp32, or the dtype of x).
    """
    wide = arithmetic_dtype(residual)
    return residual.copy_(torch.addcmul(residual.to(wide), x.to(wide), gate.to(wide)))


def _triton_supports(residual: Tensor, x: Tensor, gate: Tensor) -> str | None:
    triton_backend.check_shapes("gated_add", x=(x, residual.shape), gate=(gate, residual.shape[-1:]))
    return triton_backend.takes_rows(residual=residual, x=x) or triton_backend.takes_contiguous(gate=gate)


@gated_add.implementation(
    "triton",
    device="cuda",
    dtypes=FLOATS,
    supports=_triton_supports,
    available=triton_backend.unavailable,
)
def _triton(residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    triton_backend.kernel("gated_add")(residual, x, gate)
    return residual


def _one_dtype(residual: Tensor, x: Tensor, gate: Tensor) -> str | None:
    """The support of an implementation for rows of one dtype and a gate in it or in float32."""
    same = x.dtype == residual.dtype and gate.dtype in (torch.float32, x.dtype)
    return None if same else "takes residual and x of one dtype, and a gate in it or in float32"


@gated_add.implementation(
    "cpu", device="cpu", dtypes=FLOATS, supports=_one_dtype, available=native.cpu_unavailable
)
def _cpu(residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    native.cpu().gated_add(residual, x, gate)
    return residual
