"""Elementwise ops: the decoder's gated activation, and the transformer's gated residual."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from blip3o_rt.ops.dtypes import FLOATS, cast_out, compute_dtype
from blip3o_rt.ops.registry import op
from blip3o_rt.ops.triton_backend import takes_contiguous, takes_rows

__all__ = ["gated_add", "silu_mul"]


@op("gate_up [..., 2 I] -> [..., I]", tolerance=1e-6)
def silu_mul(gate_up: Tensor, *, out: Tensor | None = None) -> Tensor:
    """silu(gate) * up for gate_up [..., 2 I] = (gate | up) -> [..., I] in the dtype of gate_up."""
    gate, up = gate_up.to(compute_dtype(gate_up)).chunk(2, dim=-1)
    return cast_out(F.silu(gate) * up, gate_up.dtype, out)


silu_mul.native("cuda", dtypes=FLOATS)
silu_mul.native("cpu", dtypes=FLOATS)


@op("residual [..., D], x [..., D], gate [D] -> residual", tolerance=1e-6)
def gated_add(residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    """residual += gate * x, in place, rounded once; returns residual.

    residual and x [..., D], gate [D] (fp32, or the dtype of x). Known as a gated residual.
    """
    dtype = compute_dtype(residual)
    return residual.copy_(torch.addcmul(residual.to(dtype), x.to(dtype), gate.to(dtype)))


def _rows_and_gate(call: Any) -> str | None:
    return takes_rows(call, "residual", "x") or takes_contiguous(call, "gate")


def _one_dtype(call: Any) -> str | None:
    same = call.x.dtype == call.residual.dtype and call.gate.dtype in (torch.float32, call.x.dtype)
    return None if same else "takes residual and x of one dtype, and a gate in it or in float32"


gated_add.triton(dtypes=FLOATS, supports=_rows_and_gate)
gated_add.native("cpu", dtypes=FLOATS, supports=_one_dtype)
