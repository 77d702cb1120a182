"""Tensors of the Qwen3 decoder: runtime names, shapes, and the original tensors each is made from.

Original names are those under `model.` (`lm_head.weight` stands outside it in a published file).
"""

from __future__ import annotations

from blip3o_rt.config import ARConfig
from blip3o_rt.weights import TensorSpec, direct, packed


def layout(config: ARConfig) -> list[TensorSpec]:
    """All runtime tensors of the decoder, in the order they are used; no lm_head where it is tied."""
    specs = [direct("embed_tokens.weight", config.vocab_size, config.hidden_size)]
    for index in range(config.num_layers):
        specs += _decoder_layer(config, f"layers.{index}.")
    specs.append(direct("norm.weight", config.hidden_size))
    if not config.tie_word_embeddings:
        specs.append(direct("lm_head.weight", config.vocab_size, config.hidden_size))
    return specs


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
