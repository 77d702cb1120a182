"""The Qwen3 decoder on the runtime's ops: prefill of one prompt, and one decode step for a ragged batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from blip3o_rt import ops, trace
from blip3o_rt.ar.kv_cache import PagedKVCache, Sequence
from blip3o_rt.config import ARConfig


@dataclass(frozen=True)
class Layer:
    """Weights of one decoder layer; qkv and gate|up are packed along their rows."""

    input_norm: Tensor
    qkv: Tensor
    q_norm: Tensor
    k_norm: Tensor
    attention_out: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor


@dataclass(frozen=True)
class DecodeStep:
    """Where one token of each of B sequences goes: all int32, `block_table` [B, max_blocks], the others
    [B]."""

    positions: Tensor
    slots: Tensor
    context_lengths: Tensor
    block_table: Tensor


class Workspace:
    """Activations of a decode step for one batch size, allocated once and reused by every layer and token."""

    def __init__(self, config: ARConfig, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        def buffer(width: int) -> Tensor:
            return torch.empty(batch, width, dtype=dtype, device=device)

        self.residual = buffer(config.hidden_size)
        self.normed = buffer(config.hidden_size)
        self.projected = buffer(config.hidden_size)
        self.qkv = buffer(config.query_size + 2 * config.kv_size)
        self.query = buffer(config.query_size).view(batch, config.num_heads, config.head_dim)
        self.attended = buffer(config.query_size).view(batch, config.num_heads, config.head_dim)
        self.gate_up = buffer(2 * config.intermediate_size)
        self.activated = buffer(config.intermediate_size)


def rotary_table(config: ARConfig, positions: int, device: torch.device) -> Tensor:
    """[positions, head_dim] float32: cosines in the first half of the columns, sines in the second.

    Angles are float32 products of position and inverse frequency, as the published code computes them
    (RoFormer, arXiv 2104.09864).
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    inverse_frequency = 1.0 / (config.rope_theta**exponents)
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * inverse_frequency[None, :]
    return torch.cat([angles.cos(), angles.sin()], dim=1).to(device)


class Decoder:
    """Qwen3 decoder over a paged cache.

    `weights` are the runtime tensors of part "ar", all of one dtype and on one device. Hidden states returned
    are after the final norm, as the diffusion stage and the head want them.
    """

    def __init__(self, config: ARConfig, weights: Mapping[str, Tensor], cache: PagedKVCache) -> None:
        self.config = config
        self.cache = cache
        self.embedding = weights["embed_tokens.weight"]
        self.head = self.embedding if config.tie_word_embeddings else weights["lm_head.weight"]
        self.final_norm = weights["norm.weight"]
        self.layers = [_layer(weights, f"layers.{index}.") for index in range(config.num_layers)]
        self.dtype = self.embedding.dtype
        self.device = self.embedding.device
        self._rope = rotary_table(config, config.max_position_embeddings, self.device)
        self._workspaces: dict[int, Workspace] = {}

    def embed(self, ids: Tensor) -> Tensor:
        """[.., hidden] embeddings of vocabulary ids."""
        return F.embedding(ids, self.embedding)

    @trace.spanned("ar.prefill")
    def prefill(self, embeddings: Tensor, sequence: Sequence) -> Tensor:
        """Run a prompt of P embeddings [P, hidden] from position 0; returns its P hidden states [P, hidden].

        The sequence's pages must be reserved. Each prompt runs alone, so its result cannot depend on a
        batch-mate.
        """
        config = self.config
        length = embeddings.shape[0]
        positions = torch.arange(length, dtype=torch.int32, device=self.device)
        slots = torch.tensor(self.cache.slots(sequence, 0, length), dtype=torch.int32, device=self.device)
        sequence.length = length
        residual = embeddings.clone()
        normed = ops.rms_norm(residual, self.layers[0].input_norm, config.rms_norm_eps)
        for index, layer in enumerate(self.layers):
            qkv = F.linear(normed, layer.qkv)
            query = ops.qk_norm_rope_append(
                qkv,
                layer.q_norm,
                layer.k_norm,
                self._rope,
                positions,
                slots,
                self.cache.keys[index],
                self.cache.values[index],
                config.rms_norm_eps,
            )
            keys, values = self.cache.gather(index, sequence, length)
            attended = _causal_attention(query.transpose(0, 1), keys, values)
            output = F.linear(attended.transpose(0, 1).reshape(length, -1), layer.attention_out)
            normed = ops.rms_norm(output, layer.mlp_norm, config.rms_norm_eps, residual=residual)
            output = F.linear(ops.silu_mul(F.linear(normed, layer.gate_up)), layer.down)
            normed = ops.rms_norm(output, self._norm_after(index), config.rms_norm_eps, residual=residual)
        return normed

    def decode(self, tokens: Tensor, step: DecodeStep) -> Tensor:
        """Run one token per sequence: int64 [B] -> hidden states [B, hidden].

        The result lives in a workspace and is overwritten by the next call with the same batch size. A row's
        result does not depend on the other rows.
        """
        config = self.config
        space = self._workspace(tokens.shape[0])
        torch.index_select(self.embedding, 0, tokens, out=space.residual)
        ops.rms_norm(space.residual, self.layers[0].input_norm, config.rms_norm_eps, out=space.normed)
        for index, layer in enumerate(self.layers):
            keys, values = self.cache.keys[index], self.cache.values[index]
            ops.row_linear(space.normed, layer.qkv, out=space.qkv)
            ops.qk_norm_rope_append(
                space.qkv,
                layer.q_norm,
                layer.k_norm,
                self._rope,
                step.positions,
                step.slots,
                keys,
                values,
                config.rms_norm_eps,
                out=space.query,
            )
            ops.paged_decode_attention(
                space.query,
                keys,
                values,
                step.block_table,
                step.context_lengths,
                config.head_dim**-0.5,
                out=space.attended,
            )
            ops.row_linear(space.attended.flatten(1), layer.attention_out, out=space.projected)
            ops.rms_norm(
                space.projected,
                layer.mlp_norm,
                config.rms_norm_eps,
                residual=space.residual,
                out=space.normed,
            )
            ops.row_linear(space.normed, layer.gate_up, out=space.gate_up)
            ops.silu_mul(space.gate_up, out=space.activated)
            ops.row_linear(space.activated, layer.down, out=space.projected)
            ops.rms_norm(
                space.projected,
                self._norm_after(index),
                config.rms_norm_eps,
                residual=space.residual,
                out=space.normed,
            )
        return space.normed

    def logits(self, hidden: Tensor, vocabulary: range, *, out: Tensor) -> Tensor:
        """Logits of a range of vocabulary ids: hidden states [B, hidden] -> out, float32 [B,
        len(vocabulary)]."""
        return ops.row_linear(hidden, self.head[vocabulary.start : vocabulary.stop], out=out)

    def _norm_after(self, index: int) -> Tensor:
        """The norm that follows layer `index`: the next layer's input norm, or the final one."""
        following = index + 1
        return self.layers[following].input_norm if following < len(self.layers) else self.final_norm

    def _workspace(self, batch: int) -> Workspace:
        if batch not in self._workspaces:
            self._workspaces[batch] = Workspace(self.config, batch, self.dtype, self.device)
        return self._workspaces[batch]


def _layer(weights: Mapping[str, Tensor], prefix: str) -> Layer:
    return Layer(
        input_norm=weights[prefix + "input_layernorm.weight"],
        qkv=weights[prefix + "self_attn.qkv_proj.weight"],
        q_norm=weights[prefix + "self_attn.q_norm.weight"],
        k_norm=weights[prefix + "self_attn.k_norm.weight"],
        attention_out=weights[prefix + "self_attn.o_proj.weight"],
        mlp_norm=weights[prefix + "post_attention_layernorm.weight"],
        gate_up=weights[prefix + "mlp.gate_up_proj.weight"],
        down=weights[prefix + "mlp.down_proj.weight"],
    )


def _causal_attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """[heads, P, head_dim] causal attention of a whole prompt; on the CPU in float32, where bfloat16 is far
    slower."""
    inside = torch.float32 if query.device.type == "cpu" else query.dtype
    attended = F.scaled_dot_product_attention(
        query[None].to(inside),
        keys[None].to(inside),
        values[None].to(inside),
        is_causal=True,
        enable_gqa=True,
    )
    return attended[0].to(query.dtype)
