"""Tensors of the DC-AE autoencoder: runtime names, shapes, and the original tensors each is made from.

Convolution weights are kept [out, height, width, in], as a channels-last convolution reads them.
Original names are those under `model.sana_vae.`, or without a prefix in a diffusers `vae` folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from blip3o_rt.config import VAEConfig, VAEStageConfig
from blip3o_rt.weights import SourceTensor, TensorSpec, affine, concatenate_rows, direct, reshaped

GATED_EXPANSION = 4  # hidden width of an EfficientViT block's gated convolution, in channels


def layout(config: VAEConfig) -> list[TensorSpec]:
    """All runtime tensors: the encoder's, then the decoder's, each in the order they are used."""
    return _encoder(config) + _decoder(config)


def _encoder(config: VAEConfig) -> list[TensorSpec]:
    stages = config.encoder_stages
    image = config.image_channels
    if stages[0].layers > 0:
        specs = _convolution("encoder.conv_in", stages[0].channels, image)
    else:
        specs = _downsample(config, "encoder.conv_in.conv", stages[1].channels, image)
    for index, stage in enumerate(stages):
        prefix = f"encoder.down_blocks.{index}."
        for layer in range(stage.layers):
            specs += _block(config, stage, f"{prefix}{layer}.")
        if index + 1 < len(stages) and stage.layers > 0:
            name = f"{prefix}{stage.layers}.conv"
            specs += _downsample(config, name, stages[index + 1].channels, stage.channels)
    return specs + _convolution("encoder.conv_out", config.latent_channels, stages[-1].channels)


def _decoder(config: VAEConfig) -> list[TensorSpec]:
    stages = config.decoder_stages
    specs = _convolution("decoder.conv_in", stages[-1].channels, config.latent_channels)
    for index, stage in reversed(list(enumerate(stages))):
        prefix = f"decoder.up_blocks.{index}."
        upsamples = index + 1 < len(stages) and stage.layers > 0
        if upsamples:
            specs += _upsample(config, f"{prefix}0.conv", stage.channels, stages[index + 1].channels)
        for layer in range(stage.layers):
            specs += _block(config, stage, f"{prefix}{layer + upsamples}.")
    full_resolution = stages[0].layers > 0
    last = stages[0].channels if full_resolution else stages[1].channels
    specs += affine("decoder.norm_out", last)
    if full_resolution:
        return specs + _convolution("decoder.conv_out", config.image_channels, last)
    return specs + _upsample(config, "decoder.conv_out.conv", config.image_channels, last)


def _convolution(prefix: str, channels_out: int, channels_in: int) -> list[TensorSpec]:
    return [_taps(prefix + ".weight", channels_out, channels_in), direct(prefix + ".bias", channels_out)]


def _taps(name: str, channels_out: int, channels_in: int) -> TensorSpec:
    source = SourceTensor(name, (channels_out, channels_in, 3, 3))
    return TensorSpec(name, (channels_out, 3, 3, channels_in), (source,), _channels_last)


def _channels_last(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0].permute(0, 2, 3, 1)


def _downsample(config: VAEConfig, prefix: str, channels_out: int, channels_in: int) -> list[TensorSpec]:
    unshuffled = channels_out // 4 if config.downsample == "pixel_unshuffle" else channels_out
    return _convolution(prefix, unshuffled, channels_in)


def _upsample(config: VAEConfig, prefix: str, channels_out: int, channels_in: int) -> list[TensorSpec]:
    shuffled = channels_out if config.upsample == "interpolate" else channels_out * 4
    return _convolution(prefix, shuffled, channels_in)


def _block(config: VAEConfig, stage: VAEStageConfig, prefix: str) -> list[TensorSpec]:
    channels = stage.channels
    if stage.block == "ResBlock":
        return [
            *_convolution(prefix + "conv1", channels, channels),
            _taps(prefix + "conv2.weight", channels, channels),
            *affine(prefix + "norm", channels),
        ]
    return [
        *_multiscale_attention(config, stage, prefix + "attn."),
        *_gated_convolution(channels, prefix + "conv_out."),
    ]


def _multiscale_attention(config: VAEConfig, stage: VAEStageConfig, prefix: str) -> list[TensorSpec]:
    channels, head_dim = stage.channels, config.attention_head_dim
    inner = channels // head_dim * head_dim
    grouped = partial(_group_by_letter, head_dim=head_dim)

    def regrouped(name: str, source_shape: tuple[int, ...], *shape: int) -> TensorSpec:
        return TensorSpec(name, shape, (SourceTensor(name, source_shape),), grouped)

    thirds = tuple(SourceTensor(f"{prefix}to_{letter}.weight", (inner, channels)) for letter in "qkv")
    specs = [TensorSpec(prefix + "to_qkv.weight", (3 * inner, channels), thirds, grouped)]
    for index, kernel in enumerate(stage.multiscales):
        scale = f"{prefix}to_qkv_multiscale.{index}."
        specs += [
            regrouped(scale + "proj_in.weight", (3 * inner, 1, kernel, kernel), 3 * inner, kernel, kernel, 1),
            regrouped(scale + "proj_out.weight", (3 * inner, head_dim, 1, 1), 3 * inner, 1, 1, head_dim),
        ]
    return [
        *specs,
        direct(prefix + "to_out.weight", channels, inner * (1 + len(stage.multiscales))),
        *affine(prefix + "norm_out", channels),
    ]


def _group_by_letter(tensors: Sequence[Tensor], head_dim: int) -> Tensor:
    """Rows in the order of the heads, [q k v] of each, to the rows of all q, then of all k, then of all v.

    The published to_q, to_k and to_v are thirds of such an interleaved projection: none is the query's, the
    keys' or the values' alone.
    """
    rows = concatenate_rows(tensors)
    return rows.unflatten(0, (-1, 3, head_dim)).transpose(0, 1).flatten(0, 2)


def _gated_convolution(channels: int, prefix: str) -> list[TensorSpec]:
    hidden = GATED_EXPANSION * channels
    return [
        reshaped(prefix + "conv_inverted.weight", (2 * hidden, channels), (2 * hidden, channels, 1, 1)),
        direct(prefix + "conv_inverted.bias", 2 * hidden),
        *affine(prefix + "conv_depth", 2 * hidden, 1, 3, 3),
        reshaped(prefix + "conv_point.weight", (channels, hidden), (channels, hidden, 1, 1)),
        *affine(prefix + "norm", channels),
    ]
