"""The ops of a picture's decoding."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from blip3o_rt.config import ModelConfig, VAEConfig
from blip3o_rt.measure.bench.op_shapes.shape import Make, OpShape, depthwise_glu, linear_attention
from blip3o_rt.measure.validate.case import Case, random
from blip3o_rt.vae.layout import GATED_EXPANSION

EPS = 1e-6


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
            _pixel_shuffle(sides[i], coarse, fine),
            moved=sides[i] ** 2 * (2 * fine + coarse // 4),
            check=_pixel_shuffle(min(sides[i], 64), coarse, fine),
        )
        yield OpShape(
            "add_pixel_unshuffle",
            f"vae: {sides[i]} x {sides[i]}, {fine} to {coarse} channels",
            _pixel_unshuffle(sides[i], fine, coarse),
            moved=sides[i] ** 2 * (fine + coarse // 2),
            check=_pixel_unshuffle(min(sides[i], 64), fine, coarse),
        )
        yield OpShape(
            "convolution_silu",
            f"vae: {sides[i]} x {sides[i]}, {fine} channels",
            _convolution_silu(sides[i], fine),
            products=9 * (sides[i] * fine) ** 2,
            check=_convolution_silu(min(sides[i], 32), fine),
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
        lambda dtype: linear_attention(1, side**2, heads, head_dim, dtype, norm=False),
        products=side**2 * heads * 2 * (head_dim + 1) * head_dim,
        check=lambda dtype: linear_attention(1, min(side, 32) ** 2, heads, head_dim, dtype, norm=False),
    )
    yield OpShape(
        "depthwise_glu",
        f"vae: {side} x {side}, 2 x {hidden} channels",
        depthwise_glu(1, side, hidden),
        products=side**2 * 9 * 2 * hidden,
        check=depthwise_glu(1, min(side, 8), hidden),
    )


def _pixel_shuffle(side: int, coarse: int, fine: int) -> Make:
    def make(dtype: torch.dtype) -> Case:
        result = random(1, 1, side, side, fine, dtype=dtype)
        return Case("", (result, random(2, 1, side // 2, side // 2, coarse, dtype=dtype)), written=(0,))

    return make


def _pixel_unshuffle(side: int, fine: int, coarse: int) -> Make:
    def make(dtype: torch.dtype) -> Case:
        result = random(1, 1, side // 2, side // 2, coarse, dtype=dtype)
        return Case("", (result, random(2, 1, side, side, fine, dtype=dtype)), written=(0,))

    return make


def _convolution_silu(side: int, channels: int) -> Make:
    def make(dtype: torch.dtype) -> Case:
        x, bias = random(1, 1, side, side, channels, dtype=dtype), random(3, channels, dtype=dtype)
        weight = random(2, channels, 3, 3, channels, dtype=dtype, scale=(9 * channels) ** -0.5)
        return Case("", (x, weight, bias))

    return make


def _channel_norm(side: int, channels: int) -> Make:
    def make(dtype: torch.dtype) -> Case:
        shape = (1, side, side, channels)
        x, residual = random(1, *shape, dtype=dtype), random(2, *shape, dtype=dtype)
        weights = [random(seed, channels, dtype=dtype) for seed in (3, 4)]
        return Case("", (x, *weights, EPS), {"residual": residual, "out": x}, written=("out",))

    return make
