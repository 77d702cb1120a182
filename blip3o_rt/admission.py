"""Whether a model fits into memory, asked before any of it is read."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from blip3o_rt.checkpoint.parts import weight_bytes
from blip3o_rt.config import ModelConfig
from blip3o_rt.machine import require_memory


def require_room(
    config: ModelConfig,
    dtype: torch.dtype,
    switches: Mapping[str, str],
    device: torch.device,
    max_batch: int,
    max_prompt_tokens: int,
) -> None:
    """Raise InsufficientMemoryError where weights, cache and the largest activations do not fit."""
    ar, tokens = config.ar, config.image_tokens.tokens_per_image
    kept = (max_prompt_tokens + tokens) * 2 * ar.num_layers * ar.kv_size + (tokens + 1) * ar.hidden_size
    cache = max_batch * kept * dtype.itemsize  # keys, values and hidden states
    # The decoder's last stage holds three tensors of its width at full resolution: input, product and result.
    picture = 3 * config.image_size**2 * config.vae.decoder_stages[0].channels * dtype.itemsize
    needed = sum(weight_bytes(config, dtype, switches).values()) + cache + picture
    remedy = "choose dtype bf16, a smaller max_batch, or a machine with more"
    require_memory(needed, "the model", device, remedy)
