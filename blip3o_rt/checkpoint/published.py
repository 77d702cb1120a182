"""Published configurations known by name: a checkpoint that names a hub repository needs no network."""

from __future__ import annotations

import re
from typing import Any

SANA_NAME = "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers"
SIGLIP_NAME = "google/siglip2-so400m-patch14-384"

SANA_TRANSFORMER: dict[str, Any] = {
    "_class_name": "SanaTransformer2DModel",
    "attention_bias": False,
    "attention_head_dim": 32,
    "caption_channels": 2304,
    "cross_attention_dim": 2240,
    "cross_attention_head_dim": 112,
    "dropout": 0.0,
    "guidance_embeds": False,
    "in_channels": 32,
    "interpolation_scale": None,
    "mlp_ratio": 2.5,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-06,
    "num_attention_heads": 70,
    "num_cross_attention_heads": 20,
    "num_layers": 20,
    "out_channels": 32,
    "patch_size": 1,
    "qk_norm": "rms_norm_across_heads",
    "sample_size": 32,
    "timestep_scale": 1.0,
}

_DC_AE_CHANNELS = [128, 256, 512, 512, 1024, 1024]
_DC_AE_BLOCKS = ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3
_DC_AE_MULTISCALES: list[list[int]] = [[], [], [], [5], [5], [5]]

DC_AE: dict[str, Any] = {  # dc-ae-f32c32-sana-1.1
    "_class_name": "AutoencoderDC",
    "attention_head_dim": 32,
    "decoder_act_fns": "silu",
    "decoder_block_out_channels": _DC_AE_CHANNELS,
    "decoder_block_types": _DC_AE_BLOCKS,
    "decoder_layers_per_block": [3, 3, 3, 3, 3, 3],
    "decoder_norm_types": "rms_norm",
    "decoder_qkv_multiscales": _DC_AE_MULTISCALES,
    "downsample_block_type": "Conv",
    "encoder_block_out_channels": _DC_AE_CHANNELS,
    "encoder_block_types": _DC_AE_BLOCKS,
    "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
    "encoder_qkv_multiscales": _DC_AE_MULTISCALES,
    "in_channels": 3,
    "latent_channels": 32,
    "scaling_factor": 0.41407,
    "upsample_block_type": "interpolate",
}

SANA_SCHEDULER: dict[str, Any] = {
    "_class_name": "DPMSolverMultistepScheduler",
    "flow_shift": 3.0,  # not the Euler scheduler's key, so it has no effect
    "num_train_timesteps": 1000,
    "prediction_type": "flow_prediction",
}

SIGLIP2_VISION: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "image_size": 384,
    "intermediate_size": 4304,
    "layer_norm_eps": 1e-06,
    "num_attention_heads": 16,
    "num_channels": 3,
    "num_hidden_layers": 27,
    "patch_size": 14,
}

TA_TOK_ARGUMENTS: dict[str, Any] = {
    "bottleneck": {
        "name": "bottleneck",
        "args": {
            "bottleneck_dim": 1536,
            "norm": "none",
            "regularizer": {"name": "simvq", "args": {"codebook_size": 65536, "l2_normalized": True}},
        },
    },
    "bottleneck_token_num": 729,
    "input_size": 384,
    "teacher": SIGLIP_NAME,
}

BLIP3O_NEXT_3B: dict[str, Any] = {  # Qwen3-1.7B with the image vocabulary
    "architectures": ["blip3oQwenForInferenceLM"],
    "model_type": "blip3o_qwen_inference",
    "attention_bias": False,
    "diffusion_name_or_path": SANA_NAME,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "image_end_tag_id": 151670,
    "image_start_tag_id": 151669,
    "image_start_token_id": 151674,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "mm_vision_tower": "ta_tok.pth",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_image_tokens": 65536,
    "num_key_value_heads": 8,
    "num_scale_tokens": 3,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "scale_start_token_id": 151671,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 217210,
}

DIFFUSION: dict[str, dict[str, dict[str, Any]]] = {
    SANA_NAME: {"transformer": SANA_TRANSFORMER, "vae": DC_AE, "scheduler": SANA_SCHEDULER},
}
VISION: dict[str, dict[str, Any]] = {SIGLIP_NAME: SIGLIP2_VISION}


def known_name(name_or_path: str, known: dict[str, Any]) -> str | None:
    """The known repository that a name or somebody else's path means, or None.

    A path means a repository when one of its folders has the repository's name, as a clone or the hub's
    cache (`models--owner--name`) does: "/data/models/SANA1.5_1.6B_1024px_diffusers".
    """
    folders = re.split(r"[/\\]", name_or_path)
    for name in known:
        owner, repository = name.split("/")
        if repository in folders or f"models--{owner}--{repository}" in folders:
            return name
    return None
