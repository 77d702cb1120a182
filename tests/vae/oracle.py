"""The oracle of the autoencoder: diffusers' AutoencoderDC with the same random weights."""

from __future__ import annotations

import torch
from diffusers import AutoencoderDC
from torch import Tensor, nn

from blip3o_rt.config import VAEConfig, VAEStageConfig
from blip3o_rt.vae.layout import layout

SMALL_STAGES = (
    VAEStageConfig(8, "ResBlock", 1, ()),
    VAEStageConfig(16, "ResBlock", 2, ()),
    VAEStageConfig(16, "EfficientViTBlock", 1, (5,)),
    VAEStageConfig(32, "EfficientViTBlock", 2, (3, 5)),
)


def small_config(**changes: object) -> VAEConfig:
    """An autoencoder small enough for a test, with every kind of block."""
    fields: dict[str, object] = {
        "image_channels": 3,
        "latent_channels": 8,
        "attention_head_dim": 8,
        "encoder_stages": SMALL_STAGES,
        "decoder_stages": SMALL_STAGES,
        "downsample": "Conv",
        "upsample": "interpolate",
        "encoder_out_shortcut": True,
        "decoder_in_shortcut": True,
        "scaling_factor": 0.41407,
        "shift_factor": 0.0,
    }
    return VAEConfig(**{**fields, **changes})  # type: ignore[arg-type]


def oracle(config: VAEConfig, seed: int = 0) -> AutoencoderDC:
    """AutoencoderDC of the same geometry with seeded random weights, float32, in evaluation mode.

    Norm weights and biases are random too, as a trained checkpoint's are: at their initial ones and zeros a
    swapped channel would go unnoticed.
    """
    torch.manual_seed(seed)
    halves = {"encoder": config.encoder_stages, "decoder": config.decoder_stages}
    geometry: dict[str, object] = {}
    for half, stages in halves.items():
        geometry[f"{half}_block_types"] = [stage.block for stage in stages]
        geometry[f"{half}_block_out_channels"] = [stage.channels for stage in stages]
        geometry[f"{half}_layers_per_block"] = [stage.layers for stage in stages]
        geometry[f"{half}_qkv_multiscales"] = [stage.multiscales for stage in stages]
    model = AutoencoderDC(
        in_channels=config.image_channels,
        latent_channels=config.latent_channels,
        attention_head_dim=config.attention_head_dim,
        upsample_block_type=config.upsample,
        downsample_block_type=config.downsample,
        encoder_out_shortcut=config.encoder_out_shortcut,
        decoder_in_shortcut=config.decoder_in_shortcut,
        scaling_factor=config.scaling_factor,
        **geometry,
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def round_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Round the weights as a checkpoint of that dtype would hold them, and keep them in float32."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))


def runtime_weights(config: VAEConfig, model: AutoencoderDC, dtype: torch.dtype) -> dict[str, Tensor]:
    """The oracle's weights in the runtime's layout."""
    original = model.state_dict()
    specs = layout(config)
    used = {source.name for spec in specs for source in spec.sources}
    assert used == set(original)
    return {spec.name: spec.build([original[s.name] for s in spec.sources], dtype) for spec in specs}


def oracle_decode(model: AutoencoderDC, latent: Tensor) -> Tensor:
    """The image in 0..1, computed in the oracle's dtype and scaled in float32."""
    dtype = model.decoder.conv_in.weight.dtype
    with torch.inference_mode():
        image = model.decode((latent / model.config.scaling_factor).to(dtype), return_dict=False)[0]
    return (image.to(torch.promote_types(dtype, torch.float32)) / 2 + 0.5).clamp(0, 1)


def oracle_encode(model: AutoencoderDC, pixels: Tensor) -> Tensor:
    """The latent times the scaling factor."""
    dtype = model.decoder.conv_in.weight.dtype
    with torch.inference_mode():
        latent = model.encode(pixels.to(dtype), return_dict=False)[0]
    return latent.to(torch.promote_types(dtype, torch.float32)) * model.config.scaling_factor
