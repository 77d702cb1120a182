"""The gated activation of the decoder's MLP."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from blip3o_rt.ops import native
from blip3o_rt.ops.registry import FLOATS, op
from blip3o_rt.ops.rounding import arithmetic_dtype, deliver


@op(tolerance={torch.float32: 1e-6, torch.bfloat16: 1e-6})
def silu_mul(gate_up: Tensor, *, out: Tensor | None = None) -> Tensor:
    """silu(gate) * up for gate_up [M, 2 I] = (gate | up) -> [M, I] in the dtype of gate_up."""
    gate, up = gate_up.to(arithmetic_dtype(gate_up)).chunk(2, dim=-1)
    return deliver(F.silu(gate) * up, gate_up.dtype, out)


@silu_mul.implementation("cuda", device="cuda", dtypes=FLOATS, available=native.cuda_unavailable)
def _cuda(gate_up: Tensor, *, out: Tensor | None = None) -> Tensor:
    if out is None:
        shape = (*gate_up.shape[:-1], gate_up.shape[-1] // 2)
        out = torch.empty(shape, dtype=gate_up.dtype, device=gate_up.device)
    native.cuda().silu_mul(gate_up, out=out)
    return out


@silu_mul.implementation("cpu", device="cpu", dtypes=FLOATS, available=native.cpu_unavailable)
def _cpu(gate_up: Tensor, *, out: Tensor | None = None) -> Tensor:
    if out is None:
        out = torch.empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2), dtype=gate_up.dtype)
    native.cpu().silu_mul(gate_up, out=out)
    return out
