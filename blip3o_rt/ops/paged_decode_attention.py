"""Attention of one new token per sequence over its pages of the KV cache."""

from __future__ import annotations

import torch
from torch import Tensor

from blip3o_rt.ops import native
from blip3o_rt.ops.registry import FLOATS, op
from blip3o_rt.ops.rounding import arithmetic_dtype, deliver
from blip3o_rt.ops.scratch import Scratch


@op(tolerance={torch.float32: 4e-6, torch.bfloat16: 4e-6})
def paged_decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    context_lens: Tensor,
    scale: float,
    *,
    scratch: Scratch | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """softmax(scale q k^T) v of each sequence's one query over its first context_lens[b] positions.

    q [B, Hq, D]; k_cache, v_cache [pages, Hkv, page_size, D]; query head h reads KV head h // (Hq / Hkv).
    Position p of sequence b is at page page_table[b, p // page_size] (int32 [B, max_blocks]), offset
    p % page_size; entries past the context are not read. context_lens int32 [B]; length 0 gives zeros.
    scratch: memory that a call may use (its own if there is none). out may be the memory of q.
    -> [B, Hq, D] in the dtype of q. A sequence's result does not depend on the others of the batch.

    The reference multiplies the whole width of the table and masks what lies past the context, so that the
    lengths are never read back from the device.
    """
    wide = arithmetic_dtype(q)
    _, kv_heads, page_size, head_dim = k_cache.shape
    grouped = q.to(wide).reshape(q.shape[0], kv_heads, -1, head_dim)
    result = torch.zeros_like(grouped)
    position = torch.arange(page_table.shape[1] * page_size, device=q.device)
    inside = position < context_lens[:, None]  # [B, max_blocks page_size]
    pages = torch.where(inside[:, ::page_size], page_table, 0).long()
    for b in range(q.shape[0]):  # one at a time: a product over the batch may sum in another order
        k, v = (
            cache[pages[b]].transpose(0, 1).reshape(kv_heads, -1, head_dim).to(wide)
            for cache in (k_cache, v_cache)
        )
        scores = torch.where(inside[b], scale * grouped[b] @ k.transpose(1, 2), -torch.inf)
        weights = torch.where(inside[b], torch.softmax(scores, dim=-1), 0)  # NaN where nothing is inside
        result[b] = weights @ torch.where(inside[b, :, None], v, 0)
    return deliver(result.reshape(q.shape), q.dtype, out)


@paged_decode_attention.implementation(
    "cuda", device="cuda", dtypes=FLOATS, available=native.cuda_unavailable
)
def _cuda(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    context_lens: Tensor,
    scale: float,
    *,
    scratch: Scratch | None = None,
    out: Tensor | None = None,
) -> Tensor:
    out = torch.empty_like(q) if out is None else out
    scratch = Scratch() if scratch is None else scratch
    size = native.cuda().attention_workspace(*q.shape, page_table.shape[1] * k_cache.shape[2])
    counters = scratch.counters(len(q) * k_cache.shape[1], q.device)
    memory = (scratch.memory(size, torch.float32, q.device), counters)
    native.cuda().paged_decode_attention(
        q, k_cache, v_cache, page_table, context_lens, scale, scratch=memory, out=out
    )
    return out


@paged_decode_attention.implementation("cpu", device="cpu", dtypes=FLOATS, available=native.cpu_unavailable)
def _cpu(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    context_lens: Tensor,
    scale: float,
    *,
    scratch: Scratch | None = None,
    out: Tensor | None = None,
) -> Tensor:
    out = torch.empty_like(q) if out is None else out
    native.cpu().paged_decode_attention(q, k_cache, v_cache, page_table, context_lens, scale, out=out)
    return out
