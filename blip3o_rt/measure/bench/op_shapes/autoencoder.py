"""The ops of an image's decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from blip3o_rt.config import ModelConfig, VAEConfig
from blip3o_rt.measure.bench.op_shapes.shape import Make, OpShape
from blip3o_rt.measure.cases.attention import relu_case
from blip3o_rt.measure.cases.image import convolution_case, glu_case, shuffle_case, unshuffle_case
from blip3o_rt.measure.cases.norm import channel_case
from blip3o_rt.measure.validate.case import Case
from blip3o_rt.vae.layout import GATED_EXPANSION


def autoencoder(config: ModelConfig) -> Iterator[OpShape]:
    """Norms at the finest and the coarsest resolution, and the attention blocks where there are any."""
    stages = config.vae.decoder_stages
    sides = [config.image_size >> index for index in range(len(stages))]
    ends = {(stages[i].channels, sides[i]) for i in (0, -1) if stages[i].layers}
    for channels, side in sorted(ends, reverse=True):
        yield OpShape(
            "channel_rms_norm",
            f"vae: {side} x {side}, {channels} channels, residual",
            _channel_norm(side, channels),
            moved=3 * side**2 * channels + 2 * channels,
            check=_channel_norm(min(side, 64), channels),
        )
    upsampled = [i for i, stage in enumerate(stages[:-1]) if stage.layers]
    for i in upsampled[:1]:
        fine, coarse = stages[i].channels, stages[i + 1].channels
        yield OpShape(
            "add_pixel_shuffle",
            f"vae: {sides[i]} x {sides[i]}, {coarse} to {fine} channels",
            _square(shuffle_case, sides[i], coarse, fine),
            moved=sides[i] ** 2 * (2 * fine + coarse // 4),
            check=_square(shuffle_case, min(sides[i], 64), coarse, fine),
        )
        yield OpShape(
            "add_pixel_unshuffle",
            f"vae: {sides[i]} x {sides[i]}, {fine} to {coarse} channels",
            _square(unshuffle_case, sides[i], fine, coarse),
            moved=sides[i] ** 2 * (fine + coarse // 2),
            check=_square(unshuffle_case, min(sides[i], 64), fine, coarse),
        )
        yield OpShape(
            "convolution_silu",
            f"vae: {sides[i]} x {sides[i]}, {fine} channels",
            _square(convolution_case, sides[i], fine, fine),
            products=9 * (sides[i] * fine) ** 2,
            check=_square(convolution_case, min(sides[i], 32), fine, fine),
        )
    attending = [i for i, stage in enumerate(stages) if stage.block == "EfficientViTBlock" and stage.layers]
    for i in sorted({attending[0], attending[-1]} if attending else ()):
        yield from _attention_block(config.vae, stages[i].channels, sides[i])


def _attention_block(vae: VAEConfig, channels: int, side: int) -> Iterator[OpShape]:
    head_dim, hidden = vae.attention_head_dim, GATED_EXPANSION * channels
    heads = channels // head_dim
    yield OpShape(
        "relu_linear_attention",
        f"vae: {side} x {side}, {heads} heads of {head_dim}",
        lambda dtype: relu_case("", dtype, 1, side**2, heads, head_dim, norm=False),
        products=side**2 * heads * 2 * (head_dim + 1) * head_dim,
        check=lambda dtype: relu_case("", dtype, 1, min(side, 32) ** 2, heads, head_dim, norm=False),
    )
    yield OpShape(
        "depthwise_glu",
        f"vae: {side} x {side}, 2 x {hidden} channels",
        lambda dtype: glu_case("", dtype, 1, side, side, hidden),
        products=side**2 * 9 * 2 * hidden,
        check=lambda dtype: glu_case("", dtype, 1, min(side, 8), min(side, 8), hidden),
    )


def _square(case: Callable[..., Case], side: int, channels: int, wanted: int) -> Make:
    """A case of one square image."""
    return lambda dtype: case("", dtype, 1, (side, side), channels, wanted)


def _channel_norm(side: int, channels: int) -> Make:
    """With a residual, in place."""

    def make(dtype: torch.dtype) -> Case:
        case = channel_case("", dtype, 1, side, side, channels)
        return replace(case, options={**case.options, "out": case.arguments[0]}, written=("out",))

    return make
