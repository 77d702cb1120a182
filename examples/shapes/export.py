"""Writes a run folder's model as a checkpoint in the published layout (python -m examples.shapes.export)."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from .embedded_model import EmbeddedModel
from .image_tokenizer import ImageTokenizer
from .latents import Latents
from .model_config import (
    AUTOENCODER,
    CODEBOOK_SIZE,
    LANGUAGE_MODEL,
    TRANSFORMER,
    VISION_SELECT_LAYER,
    VISION_TOWER,
)
from .tokenizer import SCALE_TOKENS, TAG_TOKENS, PromptTokenizer
from .training import finished_module

LARGEST_FILE = 24_000_000  # bytes


def checkpoint_config(tokenizer: PromptTokenizer) -> dict[str, Any]:
    """config.json: the decoder's geometry, the ids of every marker, and which editing inputs were trained."""
    token = tokenizer.tokenizer.convert_tokens_to_ids
    return {
        "architectures": ["blip3oQwenForInferenceLM"],
        "model_type": "blip3o_qwen_inference",
        **LANGUAGE_MODEL,
        "vocab_size": tokenizer.vocab_size,
        "rope_scaling": None,
        "initializer_range": 0.02,
        "sliding_window": None,
        "use_sliding_window": False,
        "use_cache": True,
        "torch_dtype": "bfloat16",
        "eos_token_id": token("<|im_end|>"),
        "pad_token_id": token("<|endoftext|>"),
        "image_start_tag_id": token("<im_start>"),
        "image_end_tag_id": token("<im_end>"),
        "scale_start_token_id": token("<S0>"),
        "scale_end_token_id": token("<S2>"),
        "image_start_token_id": tokenizer.first_image_id,
        "image_end_token_id": tokenizer.first_image_id + CODEBOOK_SIZE - 1,
        "num_image_tokens": CODEBOOK_SIZE,
        "num_scale_tokens": len(SCALE_TOKENS),
        "num_new_tokens": CODEBOOK_SIZE + len(SCALE_TOKENS) + len(TAG_TOKENS),
        "diffusion_name_or_path": "sana",
        "mm_vision_tower": "siglip2",
        "mm_vision_select_layer": VISION_SELECT_LAYER,
        "mm_hidden_size": VISION_TOWER["hidden_size"],
        "mm_patch_merge_type": "flat",
        "mm_tunable_parts": "mm_language_model",
        "mm_use_im_start_end": True,
        "use_tar_siglip_features": False,
        "use_und_image_vae": True,
        "use_und_image_vae_as_noise": True,
        "only_use_und_image_vae_as_noise": False,
    }


def checkpoint_tensors(run: Path, vocab_size: int) -> tuple[dict[str, torch.Tensor], float]:
    """Every tensor in bfloat16 under its published name, and the autoencoder's scaling factor."""
    model = finished_module(EmbeddedModel(vocab_size), run / "joint.pt")
    latents = Latents(run)
    parts = {
        "": model.language_model,
        "model.diffusion_connector.": model.diffusion_connector,
        "model.und_image_vae_connector.": model.und_image_vae_connector,
        "model.sana.": model.sana,
        "model.sana_vae.": latents.autoencoder,
        "model.vision_tower.vision_tower.": finished_module(ImageTokenizer(), run / "image_tokenizer.pt"),
    }
    tensors = {
        prefix + name: tensor.to(torch.bfloat16).contiguous()
        for prefix, part in parts.items()
        for name, tensor in part.state_dict().items()
    }
    return tensors, latents.scaling_factor


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def export(run: Path, folder: Path) -> None:
    """Writes the checkpoint folder, replacing an earlier one. Raises ValueError where it is too large."""
    tokenizer = PromptTokenizer(run / "tokenizer")
    tensors, scaling_factor = checkpoint_tensors(run, tokenizer.vocab_size)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    (partial / "model.safetensors").chmod(0o644)
    if (size := (partial / "model.safetensors").stat().st_size) > LARGEST_FILE:
        raise ValueError(
            f"model.safetensors is {size} bytes; at most {LARGEST_FILE} are accepted: use a smaller geometry"
        )
    config = checkpoint_config(tokenizer)
    _write_json(partial / "config.json", config)
    ends = {key: config[key] for key in ("eos_token_id", "pad_token_id")}
    _write_json(partial / "generation_config.json", {"_from_model_config": True, **ends})
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(run / "tokenizer" / name, partial / name)
    sana = {
        "transformer": {"_class_name": "SanaTransformer2DModel", **TRANSFORMER},
        "vae": {"_class_name": "AutoencoderDC", **AUTOENCODER, "scaling_factor": scaling_factor},
    }
    for name, content in sana.items():
        _write_json(partial / "sana" / name / "config.json", content)
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0}
    _write_json(partial / "sana" / "scheduler" / "scheduler_config.json", scheduler)
    vision = {"model_type": "siglip_vision_model", **VISION_TOWER}
    _write_json(partial / "siglip2" / "config.json", {"model_type": "siglip", "vision_config": vision})
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of training states")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder to write")
    arguments = parser.parse_args()
    export(arguments.run, arguments.out)


if __name__ == "__main__":
    main()
