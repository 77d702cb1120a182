"""Tensors of the connectors, the small networks that carry one stage's features into another.

Each is Linear, GELU, Linear, RMSNorm under the indices 0, 2 and 3; original names are those under `model.`.
"""

from __future__ import annotations

from blip3o_rt.config import ModelConfig
from blip3o_rt.weights import TensorSpec, affine, direct


def layout(config: ModelConfig) -> list[TensorSpec]:
    """All runtime tensors of the connectors that the model's editing flags use.

    `diffusion_connector` maps decoder states to the DiT's condition, `und_image_vae_connector` maps
    reference latents to it, `tar_siglip_features_connector` maps TA-Tok features to decoder embeddings.
    """
    hidden, caption = config.ar.hidden_size, config.dit.caption_channels
    specs = _connector("diffusion_connector.", hidden, caption)
    if config.edit.use_und_image_vae:
        specs += _connector("und_image_vae_connector.", config.vae.latent_channels, caption)
    if config.edit.use_tar_siglip_features and config.ta_tok is not None:
        specs += _connector("tar_siglip_features_connector.", config.ta_tok.hidden_size, hidden)
    return specs


def _connector(prefix: str, features_in: int, features_out: int) -> list[TensorSpec]:
    return [
        *affine(prefix + "0", features_out, features_in),
        *affine(prefix + "2", features_out, features_out),
        direct(prefix + "3.weight", features_out),
    ]
