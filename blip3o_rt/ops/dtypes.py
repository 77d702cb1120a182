"""Dtypes of the ops, and the rounding rule of their references: wide arithmetic, one rounding at the end."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16)
"""Dtypes of weights and activations at run time; references also run in float64."""

WEIGHTS = {torch.float32: (torch.float32, torch.bfloat16), torch.bfloat16: (torch.bfloat16,)}
"""Dtypes of a weight beside each dtype of x: arithmetic is float32, which widening changes nothing of."""

E4M3 = torch.float8_e4m3fn
"""A sign, 4 bits of exponent and 3 of fraction, no infinities."""

LARGEST_INT8 = 127
"""The largest magnitude of quantized int8 values: -128 is not used, so that the range is symmetric."""


def largest_value(dtype: torch.dtype) -> float:
    """The largest magnitude of quantized int8 or e4m3 values."""
    return torch.finfo(dtype).max if dtype.is_floating_point else LARGEST_INT8


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 operands (the exact reference of the tests), float32 for everything else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def cast_out(result: Tensor, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    """The result rounded to `dtype`, or into `out` (in its dtype) if there is one."""
    return result.to(dtype) if out is None else out.copy_(result)


def rms_normed(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in the dtype of x; x without a weight."""
    if weight is None:
        return x
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(x.dtype)


def name_of(dtype: torch.dtype) -> str:
    """The name without its module: float32."""
    return str(dtype).removeprefix("torch.")
