"""The shortcut of a downsampling block: means of groups of the fine image's unshuffled pixels, added."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from blip3o_rt.ops import native, triton_backend
from blip3o_rt.ops.add_pixel_shuffle import MOST_ELEMENTS, one_dtype
from blip3o_rt.ops.registry import FLOATS, op
from blip3o_rt.ops.rounding import arithmetic_dtype


@op(tolerance={torch.float32: 1e-6, torch.bfloat16: 1e-6})
def add_pixel_unshuffle(result: Tensor, x: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """result += the means of groups of channels of pixel_unshuffle(x) + bias, in place; returns result.

    x [B, 2 H, 2 W, C], result [B, H, W, D], 4 C a multiple of D, bias [D] or None. Unshuffled, a pixel has
    4 C channels, 4 c + 2 row + column of corner (row, column); D groups of consecutive ones are averaged. The
    sum is rounded once.
    """
    wide = arithmetic_dtype(result)
    unshuffled = F.pixel_unshuffle(x.permute(0, 3, 1, 2), 2).unflatten(1, (result.shape[-1], -1))
    total = unshuffled.mean(2, dtype=wide).permute(0, 2, 3, 1) + result
    return result.copy_(total if bias is None else total.add_(bias))


def _triton_supports(result: Tensor, x: Tensor, *, bias: Tensor | None = None) -> str | None:
    batch, height, width, wanted = result.shape[-4:]
    triton_backend.check_shapes(
        "add_pixel_unshuffle",
        result=(result, result.shape[-4:]),
        x=(x, (batch, 2 * height, 2 * width, x.shape[-1])),
        bias=(bias, (wanted,)),
    )
    if 4 * x.shape[-1] % wanted:
        return "takes four times the channels of x as a multiple of those of result"
    if x.numel() > MOST_ELEMENTS:
        return f"takes images of at most {MOST_ELEMENTS} elements"
    return triton_backend.takes_contiguous(result=result, x=x, bias=bias)


@add_pixel_unshuffle.implementation(
    "triton",
    device="cuda",
    dtypes=FLOATS,
    supports=_triton_supports,
    available=triton_backend.unavailable,
)
def _triton(result: Tensor, x: Tensor, *, bias: Tensor | None = None) -> Tensor:
    triton_backend.kernel("add_pixel_unshuffle")(result, x, bias)
    return result


@add_pixel_unshuffle.implementation(
    "cpu", device="cpu", dtypes=FLOATS, supports=one_dtype, available=native.cpu_unavailable
)
def _cpu(result: Tensor, x: Tensor, *, bias: Tensor | None = None) -> Tensor:
    native.cpu().add_pixel_unshuffle(result, x, bias=bias)
    return result
