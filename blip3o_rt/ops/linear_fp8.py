"""A product of matrices of 8-bit floating-point numbers, with a scale for each row of either."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from blip3o_rt.ops import triton_backend
from blip3o_rt.ops.registry import op
from blip3o_rt.ops.rounding import arithmetic_dtype
from blip3o_rt.weights import E4M3

UNIT = 16  # a library's product takes matrices whose sides are multiples of it

# The matrix units add the products of 8-bit numbers with some 14 bits, and the library's result is bfloat16.
TENSOR_CORE_SUMS, ROUNDED_TO_BFLOAT16 = 1e-3, 2.0**-7


@op(tolerance={torch.bfloat16: TENSOR_CORE_SUMS, torch.float32: ROUNDED_TO_BFLOAT16})
def linear_fp8(
    x: Tensor, row_scale: Tensor, weight: Tensor, scale: Tensor, *, out: Tensor, bias: Tensor | None = None
) -> Tensor:
    """out = (row_scale x) (scale weight)^T + bias, rounded once; returns out.

    x e4m3 [M, K] with row_scale float32 [M], weight e4m3 [N, K] with scale float32 [N], both scales those of
    rows; bias [N] in the dtype of out, or None; out [M, N], bfloat16 or float32.
    """
    wide = arithmetic_dtype(out)
    product = (x.to(wide) @ weight.to(wide).T) * row_scale.to(wide)[:, None] * scale.to(wide)
    return out.copy_(product if bias is None else product + bias.to(wide))


def scaled_mm(
    x: Tensor, row_scale: Tensor, weight: Tensor, scale: Tensor, *, out: Tensor, bias: Tensor | None = None
) -> Tensor:
    """The same by torch's product of scaled matrices, which sums on the matrix units and gives bfloat16."""
    narrow = out if out.dtype == torch.bfloat16 else torch.empty_like(out, dtype=torch.bfloat16)
    torch._scaled_mm(**scaled_mm_arguments(x, row_scale, weight, scale, bias), out=narrow)
    return out if narrow is out else out.copy_(narrow)


def scaled_mm_arguments(
    x: Tensor, row_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None
) -> dict[str, Any]:
    """How torch is asked for it: the second matrix by columns, scales [M, 1] and [1, N]."""
    return {
        "input": x,
        "mat2": weight.t(),
        "scale_a": row_scale[:, None],
        "scale_b": scale[None, :],
        "bias": None if bias is None else bias.to(torch.bfloat16),
        "out_dtype": torch.bfloat16,
    }


def _supports(
    x: Tensor, row_scale: Tensor, weight: Tensor, scale: Tensor, *, out: Tensor, bias: Tensor | None = None
) -> str | None:
    (rows, inputs), outputs = x.shape, len(weight)
    triton_backend.check_shapes(
        "linear_fp8",
        row_scale=(row_scale, (rows,)),
        weight=(weight, (outputs, inputs)),
        scale=(scale, (outputs,)),
        out=(out, (rows, outputs)),
        bias=(bias, (outputs,)),
    )
    if inputs % UNIT or outputs % UNIT or not rows:
        return f"takes rows, and sides of the weight that are multiples of {UNIT}"
    if {x.dtype, weight.dtype} != {E4M3}:
        return "takes x and weight of torch.float8_e4m3fn"
    return triton_backend.takes_contiguous(x=x, row_scale=row_scale, weight=weight, scale=scale, out=out)


def _unavailable() -> str | None:
    """None if torch's product of scaled matrices runs on this machine's GPUs, else the reason."""
    if not torch.cuda.is_available():
        return "no usable GPU; needs an NVIDIA GPU, its driver and a PyTorch with CUDA"
    return triton_backend.older_than(triton_backend.E4M3_CAPABILITY)


linear_fp8.implementation("scaled_mm", device="cuda", supports=_supports, available=_unavailable)(scaled_mm)
