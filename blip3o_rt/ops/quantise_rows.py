"""Activations in 8 bits for a product of integers, the fast tier's way through the diffusion transformer."""

from __future__ import annotations

import torch
from torch import Tensor

from blip3o_rt.ops import native
from blip3o_rt.ops.registry import FLOATS, op
from blip3o_rt.ops.rounding import arithmetic_dtype
from blip3o_rt.quantisation import LARGEST


@op(tolerance={torch.float32: 1e-6, torch.bfloat16: 1e-6})
def quantise_rows(x: Tensor, scale: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The nearest multiples of each row's scale, int8 -127 .. 127, for x [M, K]; writes scale float32 [M].

    A row's scale is what its largest magnitude is of 127, 0 for a row of zeros. In a row with a number that
    is infinite or none the scale is that too, and the values are any.
    """
    wide = x.to(arithmetic_dtype(x))
    scale.copy_(wide.abs().amax(dim=-1) / LARGEST)
    inverse = (1 / scale.to(wide.dtype)).nan_to_num(nan=0.0, posinf=0.0)
    values = (wide * inverse[..., None]).nan_to_num(nan=0.0).round().clamp(-LARGEST, LARGEST)
    return values.to(torch.int8) if out is None else out.copy_(values)


@quantise_rows.implementation("cpu", device="cpu", dtypes=FLOATS, available=native.cpu_unavailable)
def _cpu(x: Tensor, scale: Tensor, *, out: Tensor | None = None) -> Tensor:
    out = torch.empty(x.shape, dtype=torch.int8) if out is None else out
    native.cpu().quantise_rows(x, scale, out)
    return out
