"""Per-head RMSNorm and rotary embedding of queries and keys, and the append to the paged KV cache."""

from __future__ import annotations

import torch
from torch import Tensor

from blip3o_rt.ops import native
from blip3o_rt.ops.registry import FLOATS, op
from blip3o_rt.ops.rounding import arithmetic_dtype, deliver


@op(tolerance={torch.float32: 2e-6, torch.bfloat16: 2e-6})
def qk_norm_rope_append(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos_sin_cache: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    eps: float,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Normalise and rotate q and k of each token, write k and v to the cache, return q.

    qkv [T, (Hq + 2 Hkv) D] = (q heads | k heads | v heads); q_weight, k_weight [D]: RMSNorm over each head.
    cos_sin_cache float32 [max_positions, D] = (cos | sin), D / 2 columns each; positions int32 [T] index it;
    the two halves (a, b) of a head become (a cos - b sin, b cos + a sin).
    k_cache, v_cache [pages, Hkv, page_size, D] (the dtype of qkv): token t goes to page
    slot // page_size, offset slot % page_size, of slot = slot_mapping[t] (int32 [T]); -1 is not written.
    -> q [T, Hq, D] in the dtype of qkv.
    """
    tokens, (_, kv_heads, _, head_dim) = qkv.shape[0], k_cache.shape
    heads = qkv.reshape(tokens, qkv.shape[1] // head_dim, head_dim).to(arithmetic_dtype(qkv))
    q, k, v = heads.split([heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    cos, sin = cos_sin_cache[positions.long()].to(heads.dtype)[:, None].chunk(2, dim=-1)

    def norm_and_rotate(x: Tensor, weight: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(x.dtype)
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    if tokens:
        _append(k_cache, norm_and_rotate(k, k_weight), slot_mapping)
        _append(v_cache, v, slot_mapping)
    return deliver(norm_and_rotate(q, q_weight), qkv.dtype, out)


def _append(cache: Tensor, values: Tensor, slot_mapping: Tensor) -> None:
    """Write values [T, Hkv, D] to their slot_mapping without reading the slot_mapping back from the device.

    A token that is not written repeats one that is; if none is, all write what slot 0 already holds.
    """
    page_size = cache.shape[2]
    source = torch.where(
        slot_mapping >= 0, torch.arange(len(slot_mapping), device=slot_mapping.device), slot_mapping.argmax()
    )
    slot = slot_mapping.long()[source]
    written, slot = (slot >= 0)[:, None, None], slot.clamp(min=0)
    page, offset = slot // page_size, slot % page_size
    cache[page, :, offset] = torch.where(written, values[source].to(cache.dtype), cache[page, :, offset])


def new_query(qkv: Tensor, k_cache: Tensor) -> Tensor:
    """Memory for the queries of the tokens."""
    _, kv_heads, _, head_dim = k_cache.shape
    q_heads = qkv.shape[-1] // head_dim - 2 * kv_heads
    return torch.empty((qkv.shape[0], q_heads, head_dim), dtype=qkv.dtype, device=qkv.device)


@qk_norm_rope_append.implementation("cuda", device="cuda", dtypes=FLOATS, available=native.cuda_unavailable)
def _cuda(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos_sin_cache: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    eps: float,
    *,
    out: Tensor | None = None,
) -> Tensor:
    out = new_query(qkv, k_cache) if out is None else out
    native.cuda().qk_norm_rope_append(
        qkv, q_weight, k_weight, cos_sin_cache, positions, slot_mapping, k_cache, v_cache, eps, out=out
    )
    return out


@qk_norm_rope_append.implementation("cpu", device="cpu", dtypes=FLOATS, available=native.cpu_unavailable)
def _cpu(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos_sin_cache: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    eps: float,
    *,
    out: Tensor | None = None,
) -> Tensor:
    out = new_query(qkv, k_cache) if out is None else out
    native.cpu().qk_norm_rope_append(
        qkv, q_weight, k_weight, cos_sin_cache, positions, slot_mapping, k_cache, v_cache, eps, out=out
    )
    return out
