"""A sublayer's result added into the residual stream through a gate that the timestep gives."""

from __future__ import annotations

import torch
from torch import Tensor

from blip3o_rt.ops.registry import op
from blip3o_rt.ops.rounding import arithmetic_dtype


@op(tolerance={torch.float32: 1e-6, torch.bfloat16: 1e-6})
def gated_add(residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    """residual += gate * x, in place, rounded once; returns residual.

    residual and x [..., D], gate [D] (fp32, or the dtype of x).
    """
    wide = arithmetic_dtype(residual)
    return residual.copy_(torch.addcmul(residual.to(wide), x.to(wide), gate.to(wide)))
