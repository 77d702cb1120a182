"""Per-head RMSNorm and rotary embedding of queries and keys, and the append to the paged KV cache."""

from __future__ import annotations

import torch
from torch import Tensor

from blip3o_rt.ops import native
from blip3o_rt.ops.registry import BF16, FLOATS, op
from blip3o_rt.ops.rounding import arithmetic_dtype, deliver


@op(tolerance={torch.float32: 2e-6, torch.bfloat16: BF16})
def qk_norm_rope_append(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope_table: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    eps: float,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Normalise and rotate q and k of each token, write k and v to the cache, return q.

    qkv [T, (Hq + 2 Hkv) D] = (q heads | k heads | v heads); q_weight, k_weight [D]: RMSNorm over each head.
    rope_table float32 [max_positions, D] = (cos | sin), D / 2 columns each; positions int32 [T] index it, and
    the two halves (a, b) of a head become (a cos - b sin, b cos + a sin).
    k_cache, v_cache [pages, Hkv, page_size, D] (the dtype of qkv): token t goes to page
    slots[t] // page_size, offset slots[t] % page_size (slots int32 [T]); a slot of -1 is not written.
    -> q [T, Hq, D] in the dtype of qkv.
    """
    tokens, (_, kv_heads, page_size, head_dim) = qkv.shape[0], k_cache.shape
    heads = qkv.reshape(tokens, qkv.shape[1] // head_dim, head_dim).to(arithmetic_dtype(qkv))
    q, k, v = heads.split([heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    cos, sin = rope_table[positions.long()].to(heads.dtype)[:, None].chunk(2, dim=-1)

    def norm_and_rotate(x: Tensor, weight: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(x.dtype)
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    written = (slots >= 0).nonzero()[:, 0]
    page, offset = slots.long()[written] // page_size, slots.long()[written] % page_size
    k_cache[page, :, offset] = norm_and_rotate(k, k_weight)[written].to(k_cache.dtype)
    v_cache[page, :, offset] = v[written].to(v_cache.dtype)
    return deliver(norm_and_rotate(q, q_weight), qkv.dtype, out)


@qk_norm_rope_append.implementation("cpu", device="cpu", dtypes=FLOATS, available=native.cpu_unavailable)
def _cpu(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope_table: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    eps: float,
    *,
    out: Tensor | None = None,
) -> Tensor:
    if out is None:
        _, kv_heads, _, head_dim = k_cache.shape
        q_heads = qkv.shape[-1] // head_dim - 2 * kv_heads
        out = torch.empty((qkv.shape[0], q_heads, head_dim), dtype=qkv.dtype)
    native.cpu().qk_norm_rope_append(
        qkv, q_weight, k_weight, rope_table, positions, slots, k_cache, v_cache, eps, out
    )
    return out
