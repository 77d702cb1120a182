"""Tensors of the Qwen3 decoder: runtime names, shapes, and the original tensors each is made from.

Original names are those under `model.` (`lm_head.weight` stands outside it in a published file).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from blip3o_rt.config import ARConfig
from blip3o_rt.weights import TensorSpec, direct, in_8_bits, packed, quantized_specs, quantized_tensors

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
QUANTIZED = ("_proj.weight", HEAD)  # how the names of the matrices end that are kept in 8 bits where asked


def layout(config: ARConfig, *, values: torch.dtype | None = None) -> list[TensorSpec]:
    """All runtime tensors of the decoder, in the order they are used; no lm_head where it is tied.

    values: where given, the matrices of the layers and the head, which then is there in any case, are values
    of that dtype, int8 or e4m3, with a float32 scale for each row; embeddings and norms stay as they are.
    """
    embedding = direct(EMBEDDING, config.vocab_size, config.hidden_size)
    specs = [embedding]
    for index in range(config.num_layers):
        specs += _decoder_layer(config, f"layers.{index}.")
    specs.append(direct("norm.weight", config.hidden_size))
    if not config.tie_word_embeddings:
        specs.append(direct(HEAD, config.vocab_size, config.hidden_size))
    elif values is not None:
        specs.append(replace(embedding, name=HEAD))
    return specs if values is None else list(quantized_specs(specs, QUANTIZED, values))


def quantized(tensors: Iterable[tuple[str, Tensor]], values: torch.dtype = torch.int8) -> dict[str, Tensor]:
    """The runtime tensors of `layout(config, values=values)` from names and tensors of `layout(config)`."""
    found = quantized_tensors(tensors, QUANTIZED, values)
    if HEAD not in found:  # tied
        found.update(in_8_bits(HEAD, found[EMBEDDING], values))
    return found


def _decoder_layer(config: ARConfig, prefix: str) -> list[TensorSpec]:
    hidden, intermediate = config.hidden_size, config.intermediate_size
    attention, mlp = prefix + "self_attn.", prefix + "mlp."
    return [
        direct(prefix + "input_layernorm.weight", hidden),
        packed(
            attention + "qkv_proj.weight",
            [
                (attention + "q_proj.weight", config.query_size),
                (attention + "k_proj.weight", config.kv_size),
                (attention + "v_proj.weight", config.kv_size),
            ],
            hidden,
        ),
        direct(attention + "q_norm.weight", config.head_dim),
        direct(attention + "k_norm.weight", config.head_dim),
        direct(attention + "o_proj.weight", hidden, config.query_size),
        direct(prefix + "post_attention_layernorm.weight", hidden),
        packed(
            mlp + "gate_up_proj.weight",
            [(mlp + "gate_proj.weight", intermediate), (mlp + "up_proj.weight", intermediate)],
            hidden,
        ),
        direct(mlp + "down_proj.weight", hidden, intermediate),
    ]
