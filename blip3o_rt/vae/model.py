"""The DC-AE autoencoder: pixels to latent and latent to pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from blip3o_rt.config import VAEConfig, VAEStageConfig
from blip3o_rt.graphs import CapturedFunction, GraphRunner
from blip3o_rt.ops.dtypes import compute_dtype
from blip3o_rt.vae.blocks import (
    Block,
    ChannelNorm,
    Convolution,
    Downsampling,
    EfficientViTBlock,
    LatentIn,
    LatentOut,
    NearestUpsampling,
    ResidualBlock,
    ShuffleUpsampling,
    Weights,
    channels_first,
    channels_last,
)
from blip3o_rt.vae.tiles import tiled_beginning, tiled_end


class Autoencoder:
    """DC-AE (arXiv 2410.10733) over its weights.

    `weights` are the runtime tensors of part "vae" (vae/layout.py), all of one dtype and on one device;
    activations have that dtype, norms and attention accumulate in float32. Images go through one at a time:
    a result does not depend, in its last bit, on what shares the batch, and the memory is that of one.
    `runner` captures what `capture_decode` and `capture_encode` ask for; None is that of the weights'
    device. `tiles` is the number along a side in which the stages without attention are computed (tiles.py).
    """

    def __init__(
        self, config: VAEConfig, weights: Weights, runner: GraphRunner | None = None, tiles: int = 1
    ) -> None:
        self.config = config
        self.dtype = weights["decoder.conv_in.weight"].dtype
        self.device = weights["decoder.conv_in.weight"].device
        self._decoder = tiled_end(_decoder(config, weights), tiles)
        self._encoder = tiled_beginning(_encoder(config, weights), tiles)
        runner = runner or GraphRunner.of(self.device)
        self._decode = CapturedFunction("vae.decode", self._decode_image, runner)
        self._encode = CapturedFunction("vae.encode", self._encode_image, runner)

    def capture_decode(self, height: int, width: int) -> None:
        """Capture `decode` of latents of h x w; run it once where there are no graphs."""
        latent = torch.empty(1, self.config.latent_channels, height, width, device=self.device)
        self._decode.capture(latent)

    def capture_encode(self, height: int, width: int) -> None:
        """Capture `encode` of images of H x W pixels; run it once where there are no graphs."""
        pixels = torch.empty(1, self.config.image_channels, height, width, device=self.device)
        self._encode.capture(pixels)

    def decode(self, latent: Tensor) -> Tensor:
        """The image of a latent: [B, latent_channels, h, w] -> float32 [B, image_channels, H, W] in 0..1.

        The latent is as the diffusion model holds it, multiplied by the scaling factor; H and W are h and w
        times config.compression.
        """
        latents = latent.to(self.device, compute_dtype(latent))
        return torch.cat([self._decode(single) for single in latents.split(1)])

    def encode(self, pixels: Tensor) -> Tensor:
        """The latent of an image: [B, image_channels, H, W] in -1..1 -> float32 [B, latent_channels, h, w].

        The latent is multiplied by the scaling factor, as the diffusion model wants it. H and W are multiples
        of config.compression.
        """
        images = pixels.to(self.device, compute_dtype(pixels))
        return torch.cat([self._encode(single) for single in images.split(1)])

    def _decode_image(self, latent: Tensor) -> Tensor:
        x = latent / self.config.scaling_factor + self.config.shift_factor
        pixels = self._run(self._decoder, x).div_(2).add_(0.5)
        return pixels.masked_fill_(pixels.isinf(), torch.nan).clamp_(0, 1)  # what overflowed stays to be seen

    def _encode_image(self, pixels: Tensor) -> Tensor:
        latent = self._run(self._encoder, pixels)
        return latent.sub_(self.config.shift_factor).mul_(self.config.scaling_factor)

    def _run(self, blocks: list[Block], x: Tensor) -> Tensor:
        """The blocks one after the other, [1, C, H, W] to a fresh [1, C', H', W'] in float32 (or float64)."""
        y = channels_last(x.to(self.dtype))
        for block in blocks:
            y = block(y)
        return channels_first(y).to(compute_dtype(y)).contiguous()


def _decoder(config: VAEConfig, weights: Weights) -> list[Block]:
    stages = config.decoder_stages
    upsampling = NearestUpsampling if config.upsample == "interpolate" else ShuffleUpsampling
    blocks: list[Block] = [LatentIn(weights, "decoder.conv_in", config.decoder_in_shortcut)]
    for index, stage in reversed(list(enumerate(stages))):
        prefix = f"decoder.up_blocks.{index}."
        upsamples = index + 1 < len(stages) and stage.layers > 0
        if upsamples:
            blocks.append(upsampling(weights, prefix + "0.conv", shortcut=True))
        blocks += _stage(config, stage, weights, prefix, first=int(upsamples))
    blocks.append(ChannelNorm(weights, "decoder.norm_out", relu=True))
    if stages[0].layers > 0:
        return [*blocks, Convolution(weights, "decoder.conv_out")]
    return [*blocks, upsampling(weights, "decoder.conv_out.conv", shortcut=False)]


def _encoder(config: VAEConfig, weights: Weights) -> list[Block]:
    stages = config.encoder_stages
    unshuffle = config.downsample == "pixel_unshuffle"
    blocks: list[Block] = []
    if stages[0].layers > 0:
        blocks.append(Convolution(weights, "encoder.conv_in"))
    else:
        blocks.append(Downsampling(weights, "encoder.conv_in.conv", unshuffle, shortcut=False))
    for index, stage in enumerate(stages):
        prefix = f"encoder.down_blocks.{index}."
        blocks += _stage(config, stage, weights, prefix, first=0)
        if index + 1 < len(stages) and stage.layers > 0:
            blocks.append(Downsampling(weights, f"{prefix}{stage.layers}.conv", unshuffle, shortcut=True))
    return [*blocks, LatentOut(weights, "encoder.conv_out", config.encoder_out_shortcut)]


def _stage(
    config: VAEConfig, stage: VAEStageConfig, weights: Weights, prefix: str, first: int
) -> list[Block]:
    prefixes = [f"{prefix}{first + layer}." for layer in range(stage.layers)]
    if stage.block == "ResBlock":
        return [ResidualBlock(weights, prefix) for prefix in prefixes]
    scales = len(stage.multiscales)
    return [EfficientViTBlock(weights, prefix, config.attention_head_dim, scales) for prefix in prefixes]
