"""A new token's attention: norm, rotation and append of its heads, then attention over the KV cache."""

from __future__ import annotations

import torch
from torch import Tensor

from blip3o_rt.ops import native
from blip3o_rt.ops.paged_decode_attention import paged_decode_attention
from blip3o_rt.ops.qk_norm_rope_append import new_query, qk_norm_rope_append
from blip3o_rt.ops.registry import FLOATS, op
from blip3o_rt.ops.rounding import deliver
from blip3o_rt.ops.scratch import Scratch

HEAD_DIMS = (64, 128)
MOST_HEADS_PER_KV_HEAD = 16


# In bfloat16 an element of q between two numbers may be rounded to either, which shows in the result.
@op(tolerance={torch.float32: 8e-6, torch.bfloat16: 5e-4})
def decode_attention(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos_sin_cache: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    context_lens: Tensor,
    eps: float,
    scale: float,
    *,
    scratch: Scratch | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """qk_norm_rope_append of one token per sequence, then paged_decode_attention of the query that it gives.

    The arguments are those of the two ops, T = B. slot_mapping[b] is the slot of position
    context_lens[b] - 1, the new token, or -1: nothing is written. scratch: memory that a call may use.
    -> [B, Hq, D] in the dtype of qkv. A sequence's result does not depend on the others of the batch.
    """
    query = qk_norm_rope_append.reference(
        qkv, q_weight, k_weight, cos_sin_cache, positions, slot_mapping, k_cache, v_cache, eps
    )
    attended = paged_decode_attention.reference(query, k_cache, v_cache, page_table, context_lens, scale)
    return deliver(attended, qkv.dtype, out)


def _takes(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos_sin_cache: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *others: object,
    **options: object,
) -> str | None:
    """None for the sizes of heads that there are kernels for, where 16 bytes are moved at a time."""
    _, kv_heads, _, head_dim = k_cache.shape
    q_heads = qkv.shape[-1] // head_dim - 2 * kv_heads
    if head_dim not in HEAD_DIMS or q_heads > MOST_HEADS_PER_KV_HEAD * kv_heads:
        return f"takes heads of 64 or 128, up to {MOST_HEADS_PER_KV_HEAD} for one KV head"
    apart = len(qkv) <= 1 or qkv.stride(0) % 8 == 0
    moved = (qkv, q_weight, k_weight, cos_sin_cache, k_cache, v_cache)
    if not (apart and all(tensor.data_ptr() % 16 == 0 for tensor in moved)):
        return "takes rows that begin at multiples of 16 bytes"
    return None


@decode_attention.implementation(
    "cuda", device="cuda", dtypes=FLOATS, supports=_takes, available=native.cuda_unavailable
)
def _cuda(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos_sin_cache: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    context_lens: Tensor,
    eps: float,
    scale: float,
    *,
    scratch: Scratch | None = None,
    out: Tensor | None = None,
) -> Tensor:
    out = new_query(qkv, k_cache) if out is None else out
    scratch = Scratch() if scratch is None else scratch
    size = native.cuda().attention_workspace(*out.shape, page_table.shape[1] * k_cache.shape[2])
    native.cuda().decode_attention(
        qkv,
        q_weight,
        k_weight,
        cos_sin_cache,
        positions,
        slot_mapping,
        k_cache,
        v_cache,
        page_table,
        context_lens,
        eps,
        scale,
        scratch=(
            scratch.memory(size, torch.float32, qkv.device),
            scratch.counters(len(out) * k_cache.shape[1], qkv.device),
        ),
        out=out,
    )
    return out


@decode_attention.implementation("composed", dtypes=FLOATS)
def _composed(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos_sin_cache: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    context_lens: Tensor,
    eps: float,
    scale: float,
    *,
    scratch: Scratch | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The two ops, each on its own best implementation; the query is where the result will be."""
    query = qk_norm_rope_append(
        qkv, q_weight, k_weight, cos_sin_cache, positions, slot_mapping, k_cache, v_cache, eps, out=out
    )
    return paged_decode_attention(
        query, k_cache, v_cache, page_table, context_lens, scale, scratch=scratch, out=query
    )
