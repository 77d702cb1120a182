"""The ops of a denoising step."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from blip3o_rt.config import ModelConfig
from blip3o_rt.measure.bench.op_shapes.shape import FP32, Make, OpShape, linear
from blip3o_rt.measure.cases.attention import cross_case, relu_case
from blip3o_rt.measure.cases.image import glu_case
from blip3o_rt.measure.cases.quantized import fp8_case, integers_case, quantize_case, scale_case
from blip3o_rt.measure.cases.sampling import euler_case
from blip3o_rt.measure.validate.case import Case, random
from blip3o_rt.ops.dtypes import E4M3


def transformer(config: ModelConfig) -> Iterator[OpShape]:
    """A step of text-to-image, both branches of guidance."""
    dit = config.dit
    side, width = dit.sample_size // dit.patch_size, dit.width
    tokens = side**2
    label = f"dit: 2 x {tokens} tokens of {width}"

    def rows(seed: int, dtype: torch.dtype) -> Tensor:
        return random(seed, 2, tokens, width, dtype=dtype)

    def quantized_rows(values: torch.dtype) -> Make:
        return lambda dtype: quantize_case("", rows(1, dtype).flatten(0, 1), values)

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
            quantized_rows(values),
            moved=2 * tokens * width,
        )
    yield OpShape(
        "integer_product",
        f"dit: {2 * tokens} x {width} x {3 * width}",
        lambda _: integers_case("", 2 * tokens, width, 3 * width),
        products=2 * tokens * width * 3 * width,
        dtypes=FP32,
        check=lambda _: integers_case("", min(2 * tokens, 64), width, min(3 * width, 256)),
    )
    yield OpShape(
        "scale_product",
        label,
        lambda dtype: scale_case("", dtype, 2 * tokens, width),
        check=lambda dtype: scale_case("", dtype, min(2 * tokens, 64), width),
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
        lambda dtype: fp8_case("", dtype, 2 * tokens, width, 3 * width),
        products=2 * tokens * width * 3 * width,
        check=lambda dtype: fp8_case("", dtype, min(2 * tokens, 64), width, min(3 * width, 256)),
    )
    yield OpShape(
        "relu_linear_attention",
        f"dit: 2 x {tokens} tokens, {dit.num_heads} heads of {dit.head_dim}",
        lambda dtype: relu_case("", dtype, 2, tokens, dit.num_heads, dit.head_dim, norm=dit.qk_norm),
        products=2 * tokens * dit.num_heads * 2 * (dit.head_dim + 1) * dit.head_dim,
    )
    keys = config.image_tokens.tokens_per_image + 1
    yield OpShape(
        "cross_attention",
        f"dit: {tokens} queries, {keys} keys, {dit.num_cross_heads} heads of {dit.cross_head_dim}",
        lambda dtype: cross_case(
            "", dtype, tokens, keys, dit.num_cross_heads, dit.cross_head_dim, norm=dit.qk_norm
        ),
        products=2 * tokens * keys * dit.cross_width,
    )
    yield OpShape(
        "depthwise_glu",
        f"dit: 2 x {side} x {side}, 2 x {dit.mlp_hidden} channels",
        lambda dtype: glu_case("", dtype, 2, side, side, dit.mlp_hidden),
        products=2 * tokens * 9 * 2 * dit.mlp_hidden,
        check=lambda dtype: glu_case("", dtype, 1, min(side, 8), min(side, 8), dit.mlp_hidden),
    )
    channels = config.vae.latent_channels
    yield OpShape(
        "guided_euler_step",
        f"dit: {channels} x {dit.sample_size} x {dit.sample_size}",
        lambda _: euler_case("", (channels, dit.sample_size, dit.sample_size), 2.0),
        dtypes=FP32,
    )
