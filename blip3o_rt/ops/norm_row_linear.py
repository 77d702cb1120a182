"""RMSNorm of a few rows and their product with a weight matrix, gated or not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from blip3o_rt.errors import OpError
from blip3o_rt.ops import native
from blip3o_rt.ops.registry import FLOATS, op
from blip3o_rt.ops.rms_norm import rms_norm
from blip3o_rt.ops.row_linear_w8 import unknown_to_cpu
from blip3o_rt.ops.row_product import product, reference_product, unknown_weight
from blip3o_rt.ops.scratch import Scratch
from blip3o_rt.ops.silu_mul import silu_mul

FUSED_ROWS = 8  # of x that one CUDA kernel norms and multiplies: those of one product of the tensor cores


@op(tolerance={torch.float32: 1e-5, torch.bfloat16: 2e-2})
def norm_row_linear(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    *,
    scale: Tensor | None = None,
    gated: bool = False,
    scratch: Scratch | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """rms_norm(x, norm_weight, eps) weight^T for x [M, K], norm_weight [K], weight [N, K] -> [M, N].

    With `scale` float32 [N] the weight is int8 or e4m3, as in row_linear_w8. `gated`: the rows of the
    weight are N / 2 gates and as many ups, and the result is silu(gate) * up [M, N / 2]. Normed rows, gates
    and ups are rounded to the dtype of x, so that the bits are those of rms_norm, row_linear and silu_mul one
    after the other; hence the tolerance of bfloat16. `out` must not overlap x; OpError if it begins where x
    does. scratch: memory that a call may use (else it makes its own). Each row of a contiguous x has the
    same bits whatever the other rows are and however many.
    """
    if out is not None and x.numel() and out.data_ptr() == x.data_ptr():
        raise OpError("norm_row_linear: out must not be the memory of x; give it memory of its own")
    normed = rms_norm.reference(x, norm_weight, eps)
    if not gated:
        return reference_product(normed, weight, scale, out)
    return silu_mul.reference(reference_product(normed, weight, scale), out=out)


def _supports(
    x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, *, scale: Tensor | None = None, **_: Any
) -> str | None:
    return unknown_weight(x, weight, scale)


def _supports_on_cpu(
    x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, **options: Any
) -> str | None:
    return _supports(x, norm_weight, eps, weight, **options) or unknown_to_cpu(weight)


def _supports_few(x: Tensor, *arguments: Any, **options: Any) -> str | None:
    """Every block norms the rows anew, so more are better normed once."""
    if len(x) > FUSED_ROWS:
        return f"takes up to {FUSED_ROWS} rows, got {len(x)}"
    return _supports(x, *arguments, **options)


@norm_row_linear.implementation(
    "cuda",
    device="cuda",
    dtypes=(torch.bfloat16,),
    supports=_supports_few,
    available=native.cuda_unavailable,
)
def _cuda(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    *,
    scale: Tensor | None = None,
    gated: bool = False,
    scratch: Scratch | None = None,
    out: Tensor | None = None,
) -> Tensor:
    out = _allocate(x, weight, gated) if out is None else out
    native.cuda().norm_row_linear(x, norm_weight, eps, weight, scale=scale, gated=gated, out=out)
    return out


@norm_row_linear.implementation(
    "cpu", device="cpu", dtypes=FLOATS, supports=_supports_on_cpu, available=native.cpu_unavailable
)
def _cpu(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    *,
    scale: Tensor | None = None,
    gated: bool = False,
    scratch: Scratch | None = None,
    out: Tensor | None = None,
) -> Tensor:
    out = _allocate(x, weight, gated) if out is None else out
    native.cpu().norm_row_linear(x, norm_weight, eps, weight, scale=scale, gated=gated, out=out)
    return out


@norm_row_linear.implementation("composed", dtypes=FLOATS, supports=_supports)
def _composed(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    *,
    scale: Tensor | None = None,
    gated: bool = False,
    scratch: Scratch | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The ops one after the other, each on the best implementation it has."""
    out = _allocate(x, weight, gated) if out is None else out
    scratch = Scratch() if scratch is None else scratch
    (rows, inputs), outputs = x.shape, len(weight) if gated else 0
    memory = scratch.memory(rows * (outputs + inputs), x.dtype, x.device)
    gate_up, normed = memory[: rows * (outputs + inputs)].split([rows * outputs, rows * inputs])
    normed = rms_norm(x, norm_weight, eps, out=normed.view(rows, inputs))
    if not gated:
        return product(normed, weight, scale, out)
    return silu_mul(product(normed, weight, scale, gate_up.view(rows, outputs)), out=out)


def _allocate(x: Tensor, weight: Tensor, gated: bool) -> Tensor:
    outputs = weight.shape[0] // 2 if gated else weight.shape[0]
    return torch.empty((x.shape[0], outputs), dtype=x.dtype, device=x.device)
