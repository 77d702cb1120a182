"""Activations in 8 bits for a product of quantized matrices, the fast tier's way through the transformer."""

from __future__ import annotations

import torch
from torch import Tensor

from blip3o_rt.ops import native, triton_backend
from blip3o_rt.ops.registry import FLOATS, op
from blip3o_rt.ops.rounding import arithmetic_dtype
from blip3o_rt.weights import E4M3, largest_value


@op(tolerance={torch.float32: 1e-6, torch.bfloat16: 1e-6})
def quantize_rows(
    x: Tensor, scale: Tensor, *, dtype: torch.dtype = torch.int8, out: Tensor | None = None
) -> Tensor:
    """The nearest multiples of each row's scale, int8 or e4m3, for x [M, K]; writes scale float32 [M].

    A row's scale is what its largest magnitude is of the largest value, 127 or 448, and 0 for a row of zeros.
    In a row with a number that is infinite or none the scale is that too, and the values are any. `out`
    receives the values and has their `dtype`.
    """
    wide, largest = x.to(arithmetic_dtype(x)), largest_value(dtype)
    scale.copy_(wide.abs().amax(dim=-1) / largest)
    inverse = (1 / scale.to(wide.dtype)).nan_to_num(nan=0.0, posinf=0.0)
    values = (wide * inverse[..., None]).nan_to_num(nan=0.0)
    values = (values if dtype.is_floating_point else values.round_()).clamp_(-largest, largest)
    return values.to(dtype) if out is None else out.copy_(values)


def _triton_supports(
    x: Tensor, scale: Tensor, *, dtype: torch.dtype = torch.int8, out: Tensor | None = None
) -> str | None:
    triton_backend.check_shapes("quantize_rows", scale=(scale, x.shape[:-1]), out=(out, x.shape))
    if dtype != E4M3:
        return "makes values of torch.float8_e4m3fn"
    return triton_backend.takes_rows(x=x, out=out) or triton_backend.takes_contiguous(scale=scale)


@quantize_rows.implementation(
    "triton",
    device="cuda",
    dtypes=FLOATS,
    supports=_triton_supports,
    available=triton_backend.e4m3_unavailable,
)
def _triton(
    x: Tensor, scale: Tensor, *, dtype: torch.dtype = torch.int8, out: Tensor | None = None
) -> Tensor:
    out = torch.empty(x.shape, dtype=dtype, device=x.device) if out is None else out
    triton_backend.kernel("quantize_rows")(x, scale, out)
    return out


def _makes_int8(
    x: Tensor, scale: Tensor, *, dtype: torch.dtype = torch.int8, out: Tensor | None = None
) -> str | None:
    """The support of an implementation that makes integers."""
    return None if dtype == torch.int8 else "makes values of torch.int8"


@quantize_rows.implementation(
    "cpu", device="cpu", dtypes=FLOATS, supports=_makes_int8, available=native.cpu_unavailable
)
def _cpu(x: Tensor, scale: Tensor, *, dtype: torch.dtype = torch.int8, out: Tensor | None = None) -> Tensor:
    out = torch.empty(x.shape, dtype=torch.int8) if out is None else out
    native.cpu().quantize_rows(x, scale, out=out)
    return out
