"""Guidance and one Euler step: latent + delta_sigma * (null + guidance_scale * (conditional - null)).

Tiling   a program per 1024 elements of the latent; latent and prediction may be parts of larger tensors. Both
         scalars are read from device memory, so that a captured launch can be replayed with other values.
Bytes    per element: latent and both predictions read, out written: 16.
FLOPs    5 per element.
Bound    launch latency: a latent has 32768 elements.
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import options

BLOCK = 1024


@triton.jit
def _guided_euler_step(
    latent,
    prediction,
    guidance_scale,
    delta_sigma,
    out,
    elements,
    height,
    width,
    latent_channel,
    latent_row,
    latent_column,
    prediction_half,
    prediction_channel,
    prediction_row,
    prediction_column,
    out_channel,
    out_row,
    out_column,
    block: tl.constexpr,
):
    index = tl.program_id(0) * block + tl.arange(0, block)
    inside = index < elements
    column, row, channel = index % width, index // width % height, index // (width * height)
    half = prediction + channel * prediction_channel + row * prediction_row + column * prediction_column
    null = tl.load(half, mask=inside, other=0.0)
    conditional = tl.load(half + prediction_half, mask=inside, other=0.0)
    guided = null + tl.load(guidance_scale) * (conditional - null)
    place = channel * latent_channel + row * latent_row + column * latent_column
    moved = tl.load(latent + place, mask=inside, other=0.0) + tl.load(delta_sigma) * guided
    tl.store(out + channel * out_channel + row * out_row + column * out_column, moved, mask=inside)


def guided_euler_step(
    latent: Tensor, prediction: Tensor, guidance_scale: Tensor, delta_sigma: Tensor, out: Tensor
) -> None:
    """latent and out [1, C, H, W], prediction [2, C, H, W], all fp32 with any strides; fp32 scalars."""
    _, _, height, width = latent.shape
    _guided_euler_step[(triton.cdiv(latent.numel(), BLOCK),)](
        latent,
        prediction,
        guidance_scale,
        delta_sigma,
        out,
        latent.numel(),
        height,
        width,
        *latent.stride()[1:],
        *prediction.stride(),
        *out.stride()[1:],
        block=BLOCK,
        **options(num_warps=4),
    )
