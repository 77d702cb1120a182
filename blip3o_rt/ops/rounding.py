"""The rounding rule of every torch reference: wide arithmetic inside, one rounding at the end."""

from __future__ import annotations

import torch
from torch import Tensor


def arithmetic_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 operands (the exact reference of the tests), float32 for everything else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def deliver(result: Tensor, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    """The result rounded to `dtype`, or into `out` (in its dtype) if there is one."""
    return result.to(dtype) if out is None else out.copy_(result)
