"""Causal attention of prompts over their pages of the KV cache."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from blip3o_rt.errors import OpError
from blip3o_rt.ops import native
from blip3o_rt.ops.registry import FLOATS, op
from blip3o_rt.ops.rounding import arithmetic_dtype, deliver

MOST_HEAD_DIM = 256  # of the CUDA kernels


@op(tolerance={torch.float32: 1e-5, torch.bfloat16: 3e-5})  # sums over all keys; bfloat16: weights of 16 bits
def paged_prefill_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    context_lens: Tensor,
    scale: float,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """softmax(scale q k^T) v, causal, of each sequence's last queries over its first context_lens[b]
    positions.

    q [T, Hq, D]: sequence b has the tokens cu_seqlens_q[b] .. cu_seqlens_q[b + 1] - 1 (int32 [B + 1], from 0
    to T), which are at the last positions of its context (int32 [B], at least as many); each attends to the
    positions up to its own. What is before them is in the cache already: of a prompt that is read in pieces,
    or a beginning that sequences share. k_cache, v_cache [pages, Hkv, page_size, D]; query head h reads KV
    head h // (Hq / Hkv). Position p of sequence b is at page page_table[b, p // page_size] (int32 [B,
    max_blocks]), offset p % page_size; entries past the context are not read. A value of the context that is
    not finite may show in every query of its sequence, also in those before it.
    -> [T, Hq, D] in the dtype of q. Implementation "cuda": a query's bits depend neither on other sequences
    nor on how its prompt was cut.

    The reference multiplies every query with the whole width of each table and masks what it does not see, so
    that the lengths are never read back from the device.
    """
    wide = arithmetic_dtype(q)
    tokens, (_, kv_heads, page_size, head_dim) = q.shape[0], k_cache.shape
    token = torch.arange(tokens, dtype=torch.int32, device=q.device)
    key = torch.arange(page_table.shape[1] * page_size, device=q.device)
    grouped = q.to(wide).unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)  # [Hkv, group, T, D]
    result = torch.zeros_like(grouped)
    for b, length in enumerate(context_lens):
        inside = key < length
        pages = torch.where(inside[::page_size], page_table[b], 0).long()
        k, v = (
            cache[pages].transpose(0, 1).reshape(kv_heads, 1, -1, head_dim).to(wide)
            for cache in (k_cache, v_cache)
        )
        own = (token >= cu_seqlens_q[b]) & (token < cu_seqlens_q[b + 1])
        seen = own[:, None] & (key <= (length - cu_seqlens_q[b + 1] + token)[:, None])  # [T, keys]
        scores = torch.where(seen, scale * grouped @ k.transpose(-1, -2), -torch.inf)
        weights = torch.where(seen, torch.softmax(scores, dim=-1), 0)  # NaN where nothing is seen
        result += weights @ torch.where(inside[:, None], v, 0)
    return deliver(result.permute(2, 0, 1, 3).reshape(q.shape), q.dtype, out)


def _takes(q: Tensor, *_: object, **options: object) -> str | None:
    return None if q.shape[-1] <= MOST_HEAD_DIM else f"takes heads of at most {MOST_HEAD_DIM}"


@paged_prefill_attention.implementation(
    "cuda", device="cuda", dtypes=FLOATS, supports=_takes, available=native.cuda_unavailable
)
def _cuda(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    context_lens: Tensor,
    scale: float,
    *,
    out: Tensor | None = None,
) -> Tensor:
    out = torch.empty_like(q) if out is None else out
    native.cuda().paged_prefill_attention(
        q, k_cache, v_cache, page_table, cu_seqlens_q, context_lens, scale, out=out
    )
    return out


@paged_prefill_attention.implementation("gathered", device="cpu", dtypes=FLOATS)
def _gathered(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    context_lens: Tensor,
    scale: float,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """torch's own attention, sequence by sequence, on keys and values copied out of their pages; in float32,
    because bfloat16 is far slower on a CPU."""
    out = torch.empty_like(q) if out is None else out
    starts, lengths = cu_seqlens_q.tolist(), context_lens.tolist()
    positions = page_table.shape[1] * k_cache.shape[2]
    for b, length in enumerate(lengths):
        first, end = starts[b], starts[b + 1]
        if not end - first <= length <= positions:
            raise OpError(
                f"paged_prefill_attention: context_lens[{b}] is {length}; accepted: {end - first}, the "
                f"sequence's queries, to {positions}, what page_table holds"
            )
        pages = page_table[b, : -(-length // k_cache.shape[2])].long()
        k, v = (
            cache[pages].transpose(0, 1).flatten(1, 2)[:, :length].float() for cache in (k_cache, v_cache)
        )
        attended = _causal_attention(q[first:end].transpose(0, 1).float(), k, v, scale)
        out[first:end] = attended.transpose(0, 1)
    return out


def _causal_attention(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """[heads, N, head_dim]: attention of the last N positions of a context to all of it."""
    count, length = query.shape[1], keys.shape[1]
    if count == 0:
        return query
    mask = None
    if count < length:
        mask = torch.ones(count, length, dtype=torch.bool).tril(length - count)
    attended = F.scaled_dot_product_attention(
        query[None],
        keys[None],
        values[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=True,
    )
    return attended[0]
