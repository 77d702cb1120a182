"""The oracle of the diffusion stage: diffusers' SANA with the same random weights."""

from __future__ import annotations

import torch
from diffusers import SanaTransformer2DModel
from torch import Tensor

from blip3o_rt.config import DiTConfig
from blip3o_rt.dit.conditioning import ConditionTokens
from blip3o_rt.dit.layout import layout
from blip3o_rt.dit.model import DiT


def small_config(**changes: object) -> DiTConfig:
    """A transformer small enough for a test, with a cross-attention width of its own."""
    fields: dict[str, object] = {
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "num_heads": 2,
        "head_dim": 32,
        "num_cross_heads": 3,
        "cross_head_dim": 16,
        "caption_channels": 24,
        "mlp_ratio": 2.5,
        "patch_size": 1,
        "sample_size": 8,
        "attention_bias": False,
        "qk_norm": True,
        "norm_eps": 1e-6,
        "timestep_scale": 1.0,
    }
    return DiTConfig(**{**fields, **changes})  # type: ignore[arg-type]


def oracle(config: DiTConfig, seed: int = 0) -> SanaTransformer2DModel:
    """diffusers' SANA of the same geometry, every parameter random (norm weights and biases too), float32."""
    model = SanaTransformer2DModel(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        num_layers=config.num_layers,
        num_cross_attention_heads=config.num_cross_heads,
        cross_attention_head_dim=config.cross_head_dim,
        cross_attention_dim=config.width,
        caption_channels=config.caption_channels,
        mlp_ratio=config.mlp_ratio,
        attention_bias=config.attention_bias,
        sample_size=config.sample_size,
        patch_size=config.patch_size,
        norm_eps=config.norm_eps,
        qk_norm="rms_norm_across_heads" if config.qk_norm else None,
    )
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            parameter.data = 1 + 0.3 * noise
        elif parameter.ndim == 1 or "table" in name:
            parameter.data = 0.3 * noise
        else:
            parameter.data = noise / parameter[0].numel() ** 0.5
        if config.qk_norm and ("to_q" in name or "to_k" in name):
            parameter.data *= 0.03  # queries and keys so small that the norm's epsilon shows
    return model.eval().requires_grad_(False)


def runtime(config: DiTConfig, model: SanaTransformer2DModel, dtype: torch.dtype = torch.float32) -> DiT:
    """Our transformer with the weights of diffusers' one."""
    return DiT(config, runtime_weights(config, model.state_dict(), dtype))


def runtime_weights(
    config: DiTConfig, original: dict[str, Tensor], dtype: torch.dtype, prefix: str = ""
) -> dict[str, Tensor]:
    """Runtime tensors made from original ones whose names have a prefix."""
    return {
        spec.name: spec.build([original[prefix + source.name] for source in spec.sources], dtype)
        for spec in layout(config)
    }


def predict(
    model: SanaTransformer2DModel, latent: Tensor, timestep: float, tokens: ConditionTokens
) -> Tensor:
    """diffusers' predictions [2, C, H, W] with every null token written out, the unconditional first."""
    null = tokens.null.repeat_interleave(torch.tensor(tokens.null_counts), dim=0)
    when = torch.tensor([timestep])
    halves = [model(latent, half[None], when).sample for half in (null, tokens.conditional)]
    return torch.cat(halves)


def relative_l2(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())
