"""Geometry of the embedded model: every width, depth and size that training and export share."""

from __future__ import annotations

from typing import Any

LATENT_CHANNELS = 32
LATENT_SIDE = 4
CAPTION_CHANNELS = 256
CODEBOOK_SIZE = 128  # of which blip3o_rt.measure.shapes.codes uses 105
CODE_WIDTH = 32

AUTOENCODER: dict[str, Any] = {
    "in_channels": 3,
    "latent_channels": LATENT_CHANNELS,
    "attention_head_dim": 32,
    "encoder_block_types": ["ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock", "EfficientViTBlock"],
    "decoder_block_types": ["ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock", "EfficientViTBlock"],
    "encoder_block_out_channels": [8, 16, 32, 64, 128],
    "decoder_block_out_channels": [8, 32, 64, 64, 128],
    "encoder_layers_per_block": [1, 1, 1, 1, 1],
    "decoder_layers_per_block": [3, 2, 2, 1, 1],
    "encoder_qkv_multiscales": [[], [], [], [5], [5]],
    "decoder_qkv_multiscales": [[], [], [], [5], [5]],
    "upsample_block_type": "interpolate",
    "downsample_block_type": "Conv",
    "decoder_norm_types": "rms_norm",
    "decoder_act_fns": "silu",
}

TRANSFORMER: dict[str, Any] = {
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "num_attention_heads": 8,
    "attention_head_dim": 32,
    "num_layers": 4,
    "num_cross_attention_heads": 4,
    "cross_attention_head_dim": 64,
    "cross_attention_dim": 256,
    "caption_channels": CAPTION_CHANNELS,
    "mlp_ratio": 2.0,
    "attention_bias": False,
    "sample_size": LATENT_SIDE,
    "patch_size": 1,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "interpolation_scale": None,
    "qk_norm": "rms_norm_across_heads",
    "timestep_scale": 1.0,
}

VISION_TOWER: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_channels": 3,
    "image_size": 64,
    "patch_size": 8,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "attention_dropout": 0.0,
}
VISION_SELECT_LAYER = -2

LANGUAGE_MODEL: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
}
