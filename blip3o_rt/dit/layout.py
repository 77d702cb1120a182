"""Tensors of the SANA diffusion transformer: runtime names, shapes, and the original tensors of each.

Original names are those under `model.sana.`, or without a prefix in a diffusers `transformer` folder.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from blip3o_rt.config import DiTConfig
from blip3o_rt.weights import TensorSpec, affine, direct, packed, quantized_specs, quantized_tensors, reshaped

TIMESTEP_FEATURES = 256  # width of the sinusoidal timestep embedding, fixed by the architecture

# Name suffixes of the weights that `dit_weights` quantizes.
QUANTIZED = ("to_qkv.weight", "to_q.weight", "to_out.0.weight", "conv_inverted.weight", "conv_point.weight")


def layout(config: DiTConfig, *, values: torch.dtype | None = None) -> list[TensorSpec]:
    """All runtime tensors of the DiT, in the order they are used; 1x1 convolutions become matrices.

    values: where given, the matrices of the blocks that every step multiplies with are values of that dtype,
    int8 or e4m3, with a float32 scale for each row.
    """
    width, patch_area = config.width, config.patch_size**2
    patch_shape = (width, config.in_channels, config.patch_size, config.patch_size)
    specs = [
        *affine("time_embed.emb.timestep_embedder.linear_1", width, TIMESTEP_FEATURES),
        *affine("time_embed.emb.timestep_embedder.linear_2", width, width),
        *affine("time_embed.linear", 6 * width, width),
        *affine("caption_projection.linear_1", width, config.caption_channels),
        *affine("caption_projection.linear_2", width, width),
        direct("caption_norm.weight", width),
        reshaped("patch_embed.proj.weight", (width, config.in_channels * patch_area), patch_shape),
        direct("patch_embed.proj.bias", width),
    ]
    for index in range(config.num_layers):
        specs += _block(config, f"transformer_blocks.{index}.")
    specs.append(direct("scale_shift_table", 2, width))
    specs += affine("proj_out", patch_area * config.out_channels, width)
    return specs if values is None else list(quantized_specs(specs, QUANTIZED, values))


def quantized(tensors: Iterable[tuple[str, Tensor]], values: torch.dtype = torch.int8) -> dict[str, Tensor]:
    """The runtime tensors of `layout(config, values=values)` from names and tensors of `layout(config)`."""
    return quantized_tensors(tensors, QUANTIZED, values)


def _block(config: DiTConfig, prefix: str) -> list[TensorSpec]:
    return [
        direct(prefix + "scale_shift_table", 6, config.width),
        *_self_attention(config, prefix + "attn1."),
        *_cross_attention(config, prefix + "attn2."),
        *_feed_forward(config, prefix + "ff."),
    ]


def _self_attention(config: DiTConfig, prefix: str) -> list[TensorSpec]:
    width = config.width

    def qkv(kind: str) -> list[tuple[str, int]]:
        return [(f"{prefix}to_{letter}.{kind}", width) for letter in "qkv"]

    specs = [packed(prefix + "to_qkv.weight", qkv("weight"), width)]
    if config.attention_bias:
        specs.append(packed(prefix + "to_qkv.bias", qkv("bias")))
    if config.qk_norm:
        specs += [direct(prefix + "norm_q.weight", width), direct(prefix + "norm_k.weight", width)]
    return specs + affine(prefix + "to_out.0", width, width)


def _cross_attention(config: DiTConfig, prefix: str) -> list[TensorSpec]:
    width, cross = config.width, config.cross_width
    specs = [
        *affine(prefix + "to_q", cross, width),
        packed(prefix + "to_kv.weight", [(f"{prefix}to_{letter}.weight", cross) for letter in "kv"], width),
        packed(prefix + "to_kv.bias", [(f"{prefix}to_{letter}.bias", cross) for letter in "kv"]),
    ]
    if config.qk_norm:
        specs += [direct(prefix + "norm_q.weight", cross), direct(prefix + "norm_k.weight", cross)]
    return specs + affine(prefix + "to_out.0", width, cross)


def _feed_forward(config: DiTConfig, prefix: str) -> list[TensorSpec]:
    width, hidden = config.width, config.mlp_hidden
    return [
        reshaped(prefix + "conv_inverted.weight", (2 * hidden, width), (2 * hidden, width, 1, 1)),
        direct(prefix + "conv_inverted.bias", 2 * hidden),
        *affine(prefix + "conv_depth", 2 * hidden, 1, 3, 3),
        reshaped(prefix + "conv_point.weight", (width, hidden), (width, hidden, 1, 1)),
    ]
