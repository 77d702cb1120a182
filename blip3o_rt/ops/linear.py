"""Product of many rows with a weight matrix, the work of a prompt and of a picture."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from blip3o_rt.errors import OpError
from blip3o_rt.ops import native
from blip3o_rt.ops.registry import op


@op(tolerance={torch.float32: 4e-6, torch.bfloat16: 1e-5})
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """x weight^T + bias for x [..., K], weight [N, K], bias [N], all of one dtype -> [..., N] in it.

    Summed in float32, rounded once. `out` must not overlap x, and be contiguous if it is no matrix. Raises
    OpError for another `out`.
    """
    if out is None:
        return F.linear(x, weight, bias)
    shape = (*x.shape[:-1], len(weight))
    if out.shape != shape:
        raise OpError(f"linear: out has shape {list(out.shape)}; accepted: {list(shape)}")
    if out.ndim != 2 and not out.is_contiguous():
        raise OpError("linear: out must be contiguous, or a matrix; give it memory of its own")
    rows, result = x.reshape(-1, x.shape[-1]), out.view(-1, len(weight))
    if bias is None:
        torch.mm(rows, weight.t(), out=result)
    else:
        torch.addmm(bias, rows, weight.t(), out=result)
    return out


def unavailable() -> str | None:
    """The kernel gains something where the processor multiplies bfloat16."""
    reason = native.cpu_unavailable()
    if reason is None and not native.cpu().has_bf16_products():
        reason = f"no AVX512_BF16 in the kernels in use ({native.cpu().isa()}); torch is as fast"
    return reason


def _supports(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None
) -> str | None:
    if any(other is not None and other.dtype != x.dtype for other in (weight, bias, out)):
        return "takes x, weight, bias and out of one dtype"
    if bias is not None and not (bias.is_contiguous() and bias.shape == weight.shape[:1]):
        return "takes a bias of one contiguous number for each row of the weight"
    for tensor in (x, weight, out):
        if tensor is not None and not (
            tensor.is_contiguous() or (tensor.ndim == 2 and tensor.stride(1) == 1)
        ):
            return "takes contiguous tensors, or matrices with contiguous rows"
    return None if x.shape[-1] % 2 == 0 else "takes an even K"


@linear.implementation(
    "cpu", device="cpu", dtypes=(torch.bfloat16,), supports=_supports, available=unavailable
)
def _cpu(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    out = torch.empty((*x.shape[:-1], len(weight)), dtype=x.dtype) if out is None else out
    native.cpu().linear(x, weight, bias, out=out)
    return out
