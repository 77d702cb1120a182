"""The oracle of the autoregressive stage: transformers' Qwen3 with the same random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from blip3o_rt.ar.kv_cache import PagedKVCache, Sequence
from blip3o_rt.ar.layout import layout
from blip3o_rt.config import ARConfig, ImageTokenConfig
from blip3o_rt.measure.baselines import modules
from blip3o_rt.measure.random_checkpoint import language_config


def small_config(**changes: object) -> ARConfig:
    """A decoder small enough for a test; head_dim differs from hidden / heads as it may in a checkpoint."""
    fields: dict[str, object] = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
    }
    return ARConfig(**{**fields, **changes})  # type: ignore[arg-type]


def image_tokens(config: ARConfig, tokens_per_image: int = 12) -> ImageTokenConfig:
    """Image tokens in the upper half of the vocabulary."""
    start = config.vocab_size // 2
    return ImageTokenConfig(
        image_start_tag_id=start - 3,
        image_end_tag_id=start - 2,
        scale_start_token_id=start - 1,
        image_start_token_id=start,
        num_image_tokens=config.vocab_size - start,
        tokens_per_image=tokens_per_image,
    )


def oracle(config: ARConfig, seed: int = 0) -> Any:
    """transformers' Qwen3 of the same geometry with seeded random weights, float32, in evaluation mode."""
    torch.manual_seed(seed)
    # Wide enough that attention is far from uniform.
    model = modules.language_model({**language_config(config), "initializer_range": 0.15}).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def runtime_weights(config: ARConfig, model: Any, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The oracle's weights under the runtime's names and packing."""
    state = {name.removeprefix("model."): tensor.detach() for name, tensor in model.state_dict().items()}
    return {
        spec.name: spec.build([state[source.name] for source in spec.sources], dtype)
        for spec in layout(config)
    }


def cached(cache: PagedKVCache, layer: int, sequence: Sequence, length: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a sequence's first positions: two [length, num_kv_heads, head_dim]."""
    slot_mapping = torch.tensor(cache.slot_mapping(sequence, 0, length), dtype=torch.int64)
    pages, offsets = slot_mapping // cache.page_size, slot_mapping % cache.page_size
    return cache.keys[layer][pages, :, offsets], cache.values[layer][pages, :, offsets]
