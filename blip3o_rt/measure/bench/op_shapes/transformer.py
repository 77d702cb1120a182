"""The ops of a denoising step."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from blip3o_rt.config import DiTConfig, ModelConfig
from blip3o_rt.measure.bench.op_shapes.shape import (
    FP32,
    Make,
    OpShape,
    depthwise_glu,
    linear,
    linear_attention,
)
from blip3o_rt.measure.validate.case import Case, random
from blip3o_rt.ops.dtypes import E4M3


def transformer(config: ModelConfig) -> Iterator[OpShape]:
    """A step of a picture from words, both halves of guidance."""
    dit = config.dit
    side, width = dit.sample_size // dit.patch_size, dit.width
    tokens = side**2
    label = f"dit: 2 x {tokens} tokens of {width}"

    def rows(seed: int, dtype: torch.dtype) -> Tensor:
        return random(seed, 2, tokens, width, dtype=dtype)

    yield OpShape(
        "layer_norm_modulate",
        label,
        lambda dtype: Case("", (rows(1, dtype), random(2, width), random(3, width), dit.norm_eps)),
    )
    yield OpShape(
        "gated_add",
        label,
        lambda dtype: Case("", (rows(1, dtype), rows(2, dtype), random(3, width)), written=(0,)),
    )
    for name, values in (("int8", torch.int8), ("e4m3", E4M3)):
        yield OpShape(
            "quantize_rows",
            f"{label} to {name}",
            _quantized_rows(2 * tokens, width, values),
            moved=2 * tokens * width,
        )
    yield OpShape(
        "scale_product",
        label,
        lambda dtype: _scaled(2 * tokens, width, dtype),
        check=lambda dtype: _scaled(min(2 * tokens, 64), width, dtype),
    )
    for name, outputs, inputs in (
        ("q|k|v", 3 * width, width),
        ("attention out", width, width),
        ("feed-forward in", 2 * dit.mlp_hidden, width),
        ("feed-forward out", width, dit.mlp_hidden),
    ):
        yield OpShape(
            "linear",
            f"dit: 2 x {tokens} tokens, {name} {outputs} x {inputs}",
            linear(2 * tokens, outputs, inputs),
            products=2 * tokens * outputs * inputs,
            check=linear(min(2 * tokens, 64), min(outputs, 1200), inputs),
        )
    yield OpShape(
        "linear_fp8",
        f"dit: 2 x {tokens} x {width} to {3 * width}",
        lambda dtype: _scaled_rows(2 * tokens, width, 3 * width, dtype),
        products=2 * tokens * width * 3 * width,
        check=lambda dtype: _scaled_rows(min(2 * tokens, 64), width, min(3 * width, 256), dtype),
    )
    yield OpShape(
        "relu_linear_attention",
        f"dit: 2 x {tokens} tokens, {dit.num_heads} heads of {dit.head_dim}",
        lambda dtype: linear_attention(2, tokens, dit.num_heads, dit.head_dim, dtype, norm=dit.qk_norm),
        products=2 * tokens * dit.num_heads * 2 * (dit.head_dim + 1) * dit.head_dim,
    )
    keys = config.image_tokens.tokens_per_image + 1
    yield OpShape(
        "cross_attention",
        f"dit: {tokens} queries, {keys} keys, {dit.num_cross_heads} heads of {dit.cross_head_dim}",
        lambda dtype: _cross_attention(dit, tokens, keys, dtype),
        products=2 * tokens * keys * dit.cross_width,
    )
    yield OpShape(
        "depthwise_glu",
        f"dit: 2 x {side} x {side}, 2 x {dit.mlp_hidden} channels",
        depthwise_glu(2, side, dit.mlp_hidden),
        products=2 * tokens * 9 * 2 * dit.mlp_hidden,
        check=depthwise_glu(1, min(side, 8), dit.mlp_hidden),
    )
    channels = config.vae.latent_channels
    yield OpShape(
        "guided_euler_step",
        f"dit: {channels} x {dit.sample_size} x {dit.sample_size}",
        lambda _: _euler(channels, dit.sample_size),
        dtypes=FP32,
    )


def _quantized_rows(rows: int, width: int, values: torch.dtype) -> Make:
    def make(dtype: torch.dtype) -> Case:
        return Case("", (random(1, rows, width, dtype=dtype), torch.zeros(rows)), {"dtype": values}, (1,))

    return make


def _scaled(rows: int, columns: int, dtype: torch.dtype) -> Case:
    generator = torch.Generator().manual_seed(1)
    product = torch.randint(-(2**24), 2**24, (rows, columns), generator=generator, dtype=torch.int32)
    scales = {"row_scale": random(2, rows).abs() / 127, "bias": random(3, columns, dtype=dtype)}
    out = torch.zeros(rows, columns, dtype=dtype)
    return Case("", (product, random(4, columns).abs() / 127), {**scales, "out": out}, written=("out",))


def _scaled_rows(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> Case:
    x, weight = random(1, rows, inputs).to(E4M3), random(2, outputs, inputs).to(E4M3)
    row_scale, scale = random(3, rows).abs() / 448, random(4, outputs).abs() / 448
    out = torch.zeros(rows, outputs, dtype=dtype)
    return Case("", (x, row_scale, weight, scale), {"out": out}, written=("out",))


def _cross_attention(dit: DiTConfig, tokens: int, keys: int, dtype: torch.dtype) -> Case:
    shape = (dit.num_cross_heads, keys, dit.cross_head_dim)
    key, value = random(2, *shape, dtype=dtype), random(3, *shape, dtype=dtype)
    weight = random(4, dit.cross_width, dtype=dtype) if dit.qk_norm else None
    return Case("", (random(1, tokens, dit.cross_width, dtype=dtype), key, value, weight, 1e-5))


def _euler(channels: int, side: int) -> Case:
    latent, prediction = random(1, 1, channels, side, side), random(2, 2, channels, side, side)
    return Case("", (latent, prediction, torch.tensor(2.0), torch.tensor(-0.1)))
