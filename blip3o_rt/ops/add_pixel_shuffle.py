"""The shortcut of an upsampling block: the coarse image, pixel-shuffled with its channels repeated, added."""

from __future__ import annotations

import torch
from torch import Tensor

from blip3o_rt.ops import native, triton_backend
from blip3o_rt.ops.registry import FLOATS, op
from blip3o_rt.ops.rounding import arithmetic_dtype

MOST_ELEMENTS = 2**31 - 2**16  # of an image whose elements a launch counts in 32 bits


@op(tolerance={torch.float32: 1e-6, torch.bfloat16: 1e-6})
def add_pixel_shuffle(result: Tensor, x: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """result += pixel_shuffle(x, channels repeated) + bias, in place, rounded once; returns result.

    x [B, H, W, C], result [B, 2 H, 2 W, D], 4 D a multiple of C, bias [D] or None. Channel c at corner (row,
    column) of a doubled pixel takes input channel (4 c + 2 row + column) * C // (4 D).
    """
    wide = arithmetic_dtype(result)
    channels = 4 * torch.arange(result.shape[-1], device=x.device)
    repeats = 4 * result.shape[-1] // x.shape[-1]
    for corner in range(4):
        row, column = divmod(corner, 2)
        corner_pixels = result[:, row::2, column::2]
        added = x if repeats == 4 else x.index_select(3, (channels + corner) // repeats)
        total = corner_pixels.to(wide) + added
        corner_pixels.copy_(total if bias is None else total.add_(bias))
    return result


def _triton_supports(result: Tensor, x: Tensor, *, bias: Tensor | None = None) -> str | None:
    batch, height, width, channels = x.shape[-4:]
    triton_backend.check_shapes(
        "add_pixel_shuffle",
        x=(x, x.shape[-4:]),
        result=(result, (batch, 2 * height, 2 * width, result.shape[-1])),
        bias=(bias, result.shape[-1:]),
    )
    if 4 * result.shape[-1] % channels:
        return "takes four times the channels of result as a multiple of those of x"
    if result.numel() > MOST_ELEMENTS:
        return f"takes images of at most {MOST_ELEMENTS} elements"
    return triton_backend.takes_contiguous(result=result, x=x, bias=bias)


@add_pixel_shuffle.implementation(
    "triton",
    device="cuda",
    dtypes=FLOATS,
    supports=_triton_supports,
    available=triton_backend.unavailable,
)
def _triton(result: Tensor, x: Tensor, *, bias: Tensor | None = None) -> Tensor:
    triton_backend.kernel("add_pixel_shuffle")(result, x, bias)
    return result


def one_dtype(result: Tensor, x: Tensor, *, bias: Tensor | None = None) -> str | None:
    """The support of an implementation for an image and a bias in the dtype of the result."""
    same = all(other is None or other.dtype == result.dtype for other in (x, bias))
    return None if same else "takes result, x and bias of one dtype"


@add_pixel_shuffle.implementation(
    "cpu", device="cpu", dtypes=FLOATS, supports=one_dtype, available=native.cpu_unavailable
)
def _cpu(result: Tensor, x: Tensor, *, bias: Tensor | None = None) -> Tensor:
    native.cpu().add_pixel_shuffle(result, x, bias=bias)
    return result
