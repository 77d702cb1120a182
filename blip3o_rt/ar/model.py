"""The Qwen3 decoder on the runtime's ops: prefill of one prompt, and one decode step for a ragged batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from blip3o_rt import ops, trace
from blip3o_rt.ar.kv_cache import PagedKVCache, Sequence
from blip3o_rt.ar.layout import EMBEDDING, HEAD
from blip3o_rt.ar.upload import uploaded
from blip3o_rt.config import ARConfig
from blip3o_rt.ops.layer import Linear

PREFILL_CHUNK = 256  # positions: enough that arithmetic hides the reading of the weights


class Layer:
    """Weights of one decoder layer; qkv and gate|up are packed along their rows."""

    def __init__(self, weights: Mapping[str, Tensor], prefix: str) -> None:
        self.input_norm = weights[prefix + "input_layernorm.weight"]
        self.qkv = Linear.of(weights, prefix + "self_attn.qkv_proj")
        self.q_norm = weights[prefix + "self_attn.q_norm.weight"]
        self.k_norm = weights[prefix + "self_attn.k_norm.weight"]
        self.attention_out = Linear.of(weights, prefix + "self_attn.o_proj")
        self.mlp_norm = weights[prefix + "post_attention_layernorm.weight"]
        self.gate_up = Linear.of(weights, prefix + "mlp.gate_up_proj")
        self.down = Linear.of(weights, prefix + "mlp.down_proj")


@dataclass(frozen=True)
class DecodeStep:
    """Where B rows go: all int32 but `output_slots`, `page_table` [B, max_pages], the others [B].

    output_slots: int64, where a row's hidden state is kept. windowed: whether several rows may belong to one
    sequence. Each then attends to those before it.
    """

    positions: Tensor
    slot_mapping: Tensor
    context_lens: Tensor
    page_table: Tensor
    output_slots: Tensor
    windowed: bool = False


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

    `weights` are the runtime tensors of part "ar" on one device, all of one dtype but for the matrices, which
    may be of bfloat16 beside float32, or of 8 bits.
    Hidden states returned are after the final norm, as the diffusion stage and the head want them. A prompt
    is read in chunks that begin at multiples of `prefill_chunk` positions, which is rounded up to whole
    pages.
    """

    def __init__(
        self,
        config: ARConfig,
        weights: Mapping[str, Tensor],
        cache: PagedKVCache,
        *,
        max_rows: int,
        prefill_chunk: int = PREFILL_CHUNK,
    ) -> None:
        self.config = config
        self.cache = cache
        self.prefill_chunk = cache.pages_for(prefill_chunk) * cache.page_size
        self.embedding = weights[EMBEDDING]
        self.head = Linear.of(weights, (HEAD if HEAD in weights else EMBEDDING).removesuffix(".weight"))
        self.final_norm = weights["norm.weight"]
        self.layers = [Layer(weights, f"layers.{index}.") for index in range(config.num_layers)]
        self._norms_after = [*(layer.input_norm for layer in self.layers[1:]), self.final_norm]
        self.dtype = self.final_norm.dtype  # of activations
        self.device = self.embedding.device
        self._rope = rotary_table(config, config.max_position_embeddings, self.device)
        heads = config.num_heads, config.head_dim
        shapes = (config.query_size + 2 * config.kv_size,), heads, (config.intermediate_size,)
        self._workspace = [  # q|k|v, attended and activated of a row, reused by every layer and token
            torch.empty(max_rows, *shape, dtype=self.dtype, device=self.device) for shape in shapes
        ]
        self.scratch = ops.Scratch()  # of the kernels of a token step

    def embed(self, ids: Tensor) -> Tensor:
        """[.., hidden] embeddings of vocabulary ids."""
        return F.embedding(ids, self.embedding).to(self.dtype)

    @trace.spanned("ar.prefill")
    def prefill(self, embeddings: Tensor, sequence: Sequence) -> Tensor:
        """Hidden states [N, hidden] of a prompt's embeddings [N, hidden], from `sequence.length` on.

        The sequence's pages must be reserved. Each prompt runs alone, so its result cannot depend on a
        batch-mate. Chunks begin at fixed positions. So a prompt that continues shared pages has the bits of
        one that is read from 0.
        """
        first = self.prefill_chunk - sequence.length % self.prefill_chunk
        pieces = [embeddings[:first], *embeddings[first:].split(self.prefill_chunk)]
        return torch.cat([self._prefill_chunk(piece, sequence) for piece in pieces if len(piece)])

    def _prefill_chunk(self, embeddings: Tensor, sequence: Sequence) -> Tensor:
        config = self.config
        count, start = embeddings.shape[0], sequence.length
        length = start + count
        positions = torch.arange(start, length, dtype=torch.int32, device=self.device)

        def int32(values: list[int]) -> Tensor:
            return uploaded(values, torch.int32, self.device)

        slot_mapping = int32(self.cache.slot_mapping(sequence, start, length))
        table = int32(sequence.page_table[: self.cache.pages_for(length)])[None]
        cu_seqlens_q, context_lens = int32([0, count]), int32([length])
        sequence.length = length
        residual = embeddings.clone()
        normed = ops.rms_norm(residual, self.layers[0].input_norm, config.rms_norm_eps)
        layers = zip(self.layers, self._norms_after, self.cache.keys, self.cache.values, strict=True)
        for layer, norm_after, keys, values in layers:
            qkv = layer.qkv.prompt_linear(normed)
            query = ops.qk_norm_rope_append(
                qkv,
                layer.q_norm,
                layer.k_norm,
                self._rope,
                positions,
                slot_mapping,
                keys,
                values,
                config.rms_norm_eps,
            )
            attended = ops.paged_prefill_attention(
                query, keys, values, table, cu_seqlens_q, context_lens, config.head_dim**-0.5
            )
            output = layer.attention_out.prompt_linear(attended.flatten(1))
            normed = ops.rms_norm(output, layer.mlp_norm, config.rms_norm_eps, residual=residual)
            output = layer.down.prompt_linear(ops.silu_mul(layer.gate_up.prompt_linear(normed)))
            normed = ops.rms_norm(output, norm_after, config.rms_norm_eps, residual=residual)
        return normed

    def decode(
        self, residual: Tensor, step: DecodeStep, kept: Tensor, *, out: Tensor | None = None
    ) -> Tensor:
        """Run B rows: embeddings of their tokens [B, hidden] -> hidden states [B, hidden].

        B is at most `max_rows`. kept [N, hidden] receives them too, at step.output_slots. The embeddings are
        overwritten. A row's result does not depend on the other rows.
        """
        config = self.config
        qkv, attended, activated = (memory[: len(residual)] for memory in self._workspace)
        for layer, keys, values in zip(self.layers, self.cache.keys, self.cache.values, strict=True):
            layer.qkv.norm_row_linear(
                residual, layer.input_norm, config.rms_norm_eps, scratch=self.scratch, out=qkv
            )
            self._attend(layer, qkv, keys, values, step, attended)
            layer.attention_out.row_linear_add(attended.flatten(1), residual)
            layer.gate_up.norm_row_linear(
                residual,
                layer.mlp_norm,
                config.rms_norm_eps,
                gated=True,
                scratch=self.scratch,
                out=activated,
            )
            layer.down.row_linear_add(activated, residual)
        norm = (self.final_norm, config.rms_norm_eps)
        return ops.rms_norm_keep(residual, *norm, step.output_slots, kept, out=out)

    def _attend(
        self, layer: Layer, qkv: Tensor, keys: Tensor, values: Tensor, step: DecodeStep, out: Tensor
    ) -> None:
        """Append the rows of qkv to the cache and attend to it, into out.

        Rows of one sequence read each other's keys, so all are appended before any attends: the fused op
        promises that for one row of a sequence only. The bits are the same.
        """
        heads = (qkv, layer.q_norm, layer.k_norm, self._rope, step.positions, step.slot_mapping)
        eps, scale = self.config.rms_norm_eps, self.config.head_dim**-0.5
        pages = (step.page_table, step.context_lens)
        if step.windowed:
            ops.qk_norm_rope_append(*heads, keys, values, eps, out=out)
            ops.paged_decode_attention(out, keys, values, *pages, scale, scratch=self.scratch, out=out)
        else:
            ops.decode_attention(*heads, keys, values, *pages, eps, scale, scratch=self.scratch, out=out)

    def logits(self, hidden: Tensor, vocabulary: range, *, out: Tensor) -> Tensor:
        """Hidden states [B, hidden] -> logits of a range of ids: out, float32 [B, len(vocabulary)]."""
        return self.head.rows(vocabulary.start, vocabulary.stop).row_linear(hidden, out=out)
