"""Whether a model fits into memory, asked before any of it is read."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from blip3o_rt.checkpoint.parts import weight_bytes
from blip3o_rt.config import ModelConfig
from blip3o_rt.graphs import graphs_wanted
from blip3o_rt.machine import require_memory
from blip3o_rt.pipeline.renderer import captured_geometries
from blip3o_rt.precision import FP32, Precision
from blip3o_rt.switches import VAE_TILES, setting
from blip3o_rt.vae.layout import GATED_EXPANSION


def require_model_memory(
    config: ModelConfig,
    precision: Precision,
    switches: Mapping[str, str],
    device: torch.device,
    max_batch: int,
    max_prompt_tokens: int,
) -> None:
    """Raise InsufficientMemoryError where weights, cache and the largest activations do not fit."""
    dtype = precision.arithmetic
    ar, tokens = config.ar, config.image_tokens.tokens_per_image
    longest = min(max_prompt_tokens, ar.max_position_embeddings - tokens)  # as much as can be used
    kept = (longest + tokens) * 2 * ar.num_layers * ar.kv_size + (tokens + 1) * ar.hidden_size
    cache = max_batch * kept * dtype.itemsize  # keys, values and hidden states
    activations = _activation_elements(config, setting(switches, VAE_TILES) or 1) * dtype.itemsize
    captured = _captured_bytes(config, dtype) if device.type == "cuda" and graphs_wanted() else 0
    weights = sum(weight_bytes(config, precision, switches).values())
    needed = weights + cache + activations + captured
    smaller = f"a smaller max_batch ({max_batch}) or max_prompt_tokens ({longest})"
    if cache < weights:
        smaller = "dtype bf16" if precision is FP32 else "tier fast with 8-bit weights"
    remedy = f"choose {smaller}, or a machine with more"
    require_memory(needed, "the model", device, remedy)


def _captured_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """What graphs of the diffusion stage keep room for: an image of every geometry that is captured."""
    geometries = captured_geometries(config, edits=config.ta_tok is not None)
    return sum(geometry.held_bytes(config.dit, dtype) for geometry in geometries)


def _activation_elements(config: ModelConfig, tiles: int) -> int:
    """Elements of activations that the autoencoder holds at once, for tiles along a side of its fine stages.

    The finest stage holds three tensors of its width: input, product and result. A stage with attention holds
    the hidden values, gates and results of a gated convolution. A tile has margins of up to an eighth of the
    image.
    """
    side = config.image_size
    tile = side if tiles == 1 else min(side, side // tiles + side // 8)
    held = [3 * tile**2 * config.vae.decoder_stages[0].channels]
    for index, stage in enumerate(config.vae.decoder_stages):
        if stage.block == "EfficientViTBlock":
            held.append(3 * GATED_EXPANSION * stage.channels * (side >> index) ** 2)
    return max(held)
