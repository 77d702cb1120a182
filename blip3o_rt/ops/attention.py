"""Attention: of the decoder over its paged KV cache, and of the diffusion transformer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from blip3o_rt.errors import OpError
from blip3o_rt.ops import native
from blip3o_rt.ops.dtypes import FLOATS, cast_out, compute_dtype, rms_normed
from blip3o_rt.ops.registry import op, same_dtype
from blip3o_rt.ops.scratch import Scratch
from blip3o_rt.ops.triton_backend import takes_contiguous

__all__ = [
    "cross_attention",
    "decode_attention",
    "paged_decode_attention",
    "paged_prefill_attention",
    "qk_norm_rope_append",
    "relu_linear_attention",
]

DECODE_HEAD_DIMS = (64, 128)  # of the CUDA kernel that appends and attends
MOST_HEADS_PER_KV_HEAD = 16  # of the same
PREFILL_MOST_HEAD_DIM = 256  # of the CUDA kernels
CROSS_ATTENTION_MOST_HEAD_DIM = 128  # that a Triton program holds
LINEAR_ATTENTION_MOST_HEAD_DIM = 64  # whose state a Triton program holds
EPSILON = 1e-15  # added to the denominator; 0 / EPSILON is the result of a query that meets no key

CACHES = "k_cache [pages, Hkv, page_size, D], v_cache [pages, Hkv, page_size, D], "
NEW_TOKENS = CACHES + (
    "qkv [T, (Hq + 2 Hkv) D], q_weight [D], k_weight [D], cos_sin_cache [max_positions, D], "
    "positions [T], slot_mapping [T]"
)


@op(NEW_TOKENS + " -> [T, Hq, D]", tolerance=2e-6)
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
    """Normalize and rotate q and k of each token, write k and v to the cache, return q.

    qkv [T, (Hq + 2 Hkv) D] = (q heads | k heads | v heads); q_weight, k_weight [D]: RMSNorm over each head.
    cos_sin_cache float32 [max_positions, D] = (cos | sin), D / 2 columns each; positions int32 [T] index it;
    the two halves (a, b) of a head become (a cos - b sin, b cos + a sin).
    k_cache, v_cache [pages, Hkv, page_size, D] (the dtype of qkv): token t goes to page
    slot // page_size, offset slot % page_size, of slot = slot_mapping[t] (int32 [T]); -1 is not written.
    -> q [T, Hq, D] in the dtype of qkv.
    """
    tokens, (_, kv_heads, _, head_dim) = qkv.shape[0], k_cache.shape
    heads = qkv.reshape(tokens, qkv.shape[1] // head_dim, head_dim).to(compute_dtype(qkv))
    q, k, v = heads.split([heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    cos, sin = cos_sin_cache[positions.long()].to(heads.dtype)[:, None].chunk(2, dim=-1)

    def norm_and_rotate(x: Tensor, weight: Tensor) -> Tensor:
        a, b = rms_normed(x, weight, eps).chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    if tokens:
        _append(k_cache, norm_and_rotate(k, k_weight), slot_mapping)
        _append(v_cache, v, slot_mapping)
    return cast_out(norm_and_rotate(q, q_weight), qkv.dtype, out)


def _append(cache: Tensor, values: Tensor, slot_mapping: Tensor) -> None:
    """Write values [T, Hkv, D] to their slots without reading slot_mapping back from the device.

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


qk_norm_rope_append.native("cuda", dtypes=FLOATS)
qk_norm_rope_append.native("cpu", dtypes=FLOATS)


@op("q [B, Hq, D], " + CACHES + "page_table [B, max_pages], context_lens [B] -> [B, Hq, D]", tolerance=4e-6)
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
    Position p of sequence b is at page page_table[b, p // page_size] (int32 [B, max_pages]), offset
    p % page_size; entries past the context are not read. context_lens int32 [B]; length 0 gives zeros.
    scratch: memory that a call may use (its own if there is none). out may be the memory of q.
    -> [B, Hq, D] in the dtype of q. A sequence's result does not depend on the others of the batch.

    The reference multiplies the whole width of the table and masks what lies past the context, so that the
    lengths are never read back from the device.
    """
    dtype = compute_dtype(q)
    _, kv_heads, page_size, head_dim = k_cache.shape
    grouped = q.to(dtype).reshape(q.shape[0], kv_heads, -1, head_dim)
    result = torch.zeros_like(grouped)
    position = torch.arange(page_table.shape[1] * page_size, device=q.device)
    inside = position < context_lens[:, None]  # [B, max_pages page_size]
    pages = torch.where(inside[:, ::page_size], page_table, 0).long()
    for b in range(q.shape[0]):  # one at a time: a product over the batch may sum in another order
        k, v = (_in_order(cache, pages[b]).to(dtype) for cache in (k_cache, v_cache))
        scores = torch.where(inside[b], scale * grouped[b] @ k.transpose(1, 2), -torch.inf)
        weights = torch.where(inside[b], torch.softmax(scores, dim=-1), 0)  # NaN where nothing is inside
        result[b] = weights @ torch.where(inside[b, :, None], v, 0)
    return cast_out(result.reshape(q.shape), q.dtype, out)


def _in_order(cache: Tensor, pages: Tensor) -> Tensor:
    """[Hkv, positions, D]: what a cache holds of the sequence that has these pages."""
    return cache[pages].transpose(0, 1).flatten(1, 2)


def _attention_scratch(scratch: Scratch, call: Any) -> tuple[Tensor, Tensor]:
    """Memory for the splits of the attention that writes call.out, and counters of those that are done."""
    positions = call.page_table.shape[1] * call.k_cache.shape[2]
    size = native.cuda().attention_workspace(*call.out.shape, positions)
    count = len(call.out) * call.k_cache.shape[1]
    device = call.out.device
    return scratch.memory(size, torch.float32, device), scratch.counters(count, device)


paged_decode_attention.native("cuda", dtypes=FLOATS, scratch=_attention_scratch)
paged_decode_attention.native("cpu", dtypes=FLOATS)


@op(
    NEW_TOKENS + ", page_table [T, max_pages], context_lens [T] -> [T, Hq, D]",
    # In bfloat16 an element of q between two numbers may be rounded to either, which shows in the result.
    tolerance={torch.float32: 8e-6, torch.bfloat16: 5e-4},
)
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
    return cast_out(attended, qkv.dtype, out)


def _aligned_heads(call: Any) -> str | None:
    """None for the sizes of heads that there are kernels for, where 16 bytes are moved at a time."""
    _, kv_heads, _, head_dim = call.k_cache.shape
    q_heads = call.qkv.shape[-1] // head_dim - 2 * kv_heads
    if head_dim not in DECODE_HEAD_DIMS or q_heads > MOST_HEADS_PER_KV_HEAD * kv_heads:
        return f"takes heads of 64 or 128, up to {MOST_HEADS_PER_KV_HEAD} for one KV head"
    apart = len(call.qkv) <= 1 or call.qkv.stride(0) % 8 == 0
    moved = (call.qkv, call.q_weight, call.k_weight, call.cos_sin_cache, call.k_cache, call.v_cache)
    if not (apart and all(tensor.data_ptr() % 16 == 0 for tensor in moved)):
        return "takes rows that begin at multiples of 16 bytes"
    return None


decode_attention.native("cuda", dtypes=FLOATS, supports=_aligned_heads, scratch=_attention_scratch)


@decode_attention.composed(dtypes=FLOATS)
def _(call: Any) -> Tensor:
    """The two ops, each on its own best implementation; the query is where the result will be."""
    qkv, q_weight, k_weight, cos_sin_cache, positions, slot_mapping, k_cache, v_cache, *rest = call
    page_table, context_lens, eps, scale, scratch, out = rest
    query = qk_norm_rope_append(
        qkv, q_weight, k_weight, cos_sin_cache, positions, slot_mapping, k_cache, v_cache, eps, out=out
    )
    return paged_decode_attention(
        query, k_cache, v_cache, page_table, context_lens, scale, scratch=scratch, out=query
    )


@op(
    "q [T, Hq, D], "
    + CACHES
    + "page_table [B, max_pages], context_lens [B], cu_seqlens_q [B + 1] -> [T, Hq, D]",
    tolerance={torch.float32: 1e-5, torch.bfloat16: 3e-5},  # sums over all keys; bfloat16: weights of 16 bits
)
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
    """softmax(scale q k^T) v, causal, of a sequence's last queries over its context_lens[b] positions.

    q [T, Hq, D]: sequence b has the tokens cu_seqlens_q[b] .. cu_seqlens_q[b + 1] - 1 (int32 [B + 1], from 0
    to T), which are at the last positions of its context (int32 [B], at least as many); each attends to the
    positions up to its own. What is before them is in the cache already: of a prompt that is read in pieces,
    or a beginning that sequences share. k_cache, v_cache [pages, Hkv, page_size, D]; query head h reads KV
    head h // (Hq / Hkv). Position p of sequence b is at page page_table[b, p // page_size] (int32 [B,
    max_pages]), offset p % page_size; entries past the context are not read. A value of the context that is
    not finite may show in every query of its sequence, also in those before it.
    -> [T, Hq, D] in the dtype of q. Implementation "cuda": a query's bits depend neither on other sequences
    nor on how its prompt was cut.

    The reference multiplies every query with the whole width of each table and masks what it does not see, so
    that the lengths are never read back from the device.
    """
    dtype = compute_dtype(q)
    tokens, (_, kv_heads, page_size, _) = q.shape[0], k_cache.shape
    token = torch.arange(tokens, dtype=torch.int32, device=q.device)
    key = torch.arange(page_table.shape[1] * page_size, device=q.device)
    grouped = q.to(dtype).unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)  # [Hkv, group, T, D]
    result = torch.zeros_like(grouped)
    for b, length in enumerate(context_lens):
        inside = key < length
        pages = torch.where(inside[::page_size], page_table[b], 0).long()
        k, v = (_in_order(cache, pages).to(dtype)[:, None] for cache in (k_cache, v_cache))
        own = (token >= cu_seqlens_q[b]) & (token < cu_seqlens_q[b + 1])
        seen = own[:, None] & (key <= (length - cu_seqlens_q[b + 1] + token)[:, None])  # [T, keys]
        scores = torch.where(seen, scale * grouped @ k.transpose(-1, -2), -torch.inf)
        weights = torch.where(seen, torch.softmax(scores, dim=-1), 0)  # NaN where nothing is seen
        result += weights @ torch.where(inside[:, None], v, 0)
    return cast_out(result.permute(2, 0, 1, 3).reshape(q.shape), q.dtype, out)


def _known_head_dim(call: Any) -> str | None:
    most = PREFILL_MOST_HEAD_DIM
    return None if call.q.shape[-1] <= most else f"takes heads of at most {most}"


paged_prefill_attention.native("cuda", dtypes=FLOATS, supports=_known_head_dim)


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
    """torch's own attention, sequence by sequence, on keys and values copied out of their pages.

    In float32, because bfloat16 is far slower on a CPU.
    """
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
        k, v = (_in_order(cache, pages)[:, :length].float() for cache in (k_cache, v_cache))
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


@op(
    "key [H, M, d], value [H, M, d], query [N, H d], query_weight [H d], log_multiplicity [M] -> [N, H d]",
    tolerance={torch.float32: 1e-5, torch.bfloat16: 2e-2},
)
def cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_weight: Tensor | None,
    eps: float,
    *,
    log_multiplicity: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(d) + log_multiplicity) v per head, where q = rms_norm(query).

    query [N, H d], key and value [H, M, d] -> [N, H d] in the dtype of query. The norm is over all H d
    channels of a token, with query_weight [H d] and `eps`; without a weight there is none (keys come normed).
    log_multiplicity fp32 [M]: a key that stands for n identical ones adds log(n) to its logits.

    In bfloat16 the normed query and the weights may be rounded to it before they are multiplied, as those of
    the published code are; hence the tolerance of bfloat16.
    """
    dtype = compute_dtype(query)
    q = rms_normed(query.to(dtype), query_weight, eps).unflatten(-1, (key.shape[0], -1)).transpose(0, 1)
    bias = None if log_multiplicity is None else log_multiplicity.to(dtype).expand(1, 1, len(query), -1)
    attended = F.scaled_dot_product_attention(q[None], key.to(dtype)[None], value.to(dtype)[None], bias)[0]
    return cast_out(attended.transpose(0, 1).flatten(1), query.dtype, out)


def _channels_of_one_dtype(call: Any) -> str | None:
    if call.key.shape[-1] > CROSS_ATTENTION_MOST_HEAD_DIM:
        return f"takes heads of at most {CROSS_ATTENTION_MOST_HEAD_DIM} channels"
    for tensor in (call.query, call.key, call.value, call.out):
        if tensor is not None and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            return "takes query, key, value and out with contiguous channels"
    return _attended_dtype(call) or takes_contiguous(call, "query_weight", "log_multiplicity")


_attended_dtype = same_dtype("query", "key", "value", "out")  # compiled, so once


cross_attention.triton(dtypes=FLOATS, supports=_channels_of_one_dtype)
cross_attention.native("cpu", dtypes=FLOATS, supports=same_dtype("query", "key", "value", "query_weight"))


@op(
    "qkv [B, N, 3 num_heads d], q_weight [num_heads d], k_weight [num_heads d] -> [B, N, num_heads d]",
    tolerance=1e-5,  # sums over all tokens
)
def relu_linear_attention(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    num_heads: int,
    eps: float,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """q_n . sum_m(k_m v_m) / (q_n . sum_m(k_m) + 1e-15) per head, where q, k = relu(rms_norm(.)).

    qkv [B, N, 3 D] = (q | k | v), D = num_heads * head_dim -> [B, N, D] in the dtype of qkv. The norm is over
    all D channels of a token, with weights [D] and `eps`; without weights there is no norm. The sums over the
    N tokens are kept in fp32. (SANA, arXiv 2410.10629.)
    """
    dtype = compute_dtype(qkv)
    q, k, v = qkv.chunk(3, dim=-1)
    q, k = (rms_normed(t.to(dtype), weight, eps).relu() for t, weight in ((q, q_weight), (k, k_weight)))
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v.to(dtype)))  # [B, H, N, d]
    state = k.transpose(2, 3) @ v  # [B, H, d, d]
    total = k.sum(2).unsqueeze(-1)  # [B, H, d, 1]
    attended = (q @ state).div_((q @ total).add_(EPSILON))
    return cast_out(attended.transpose(1, 2).flatten(2), qkv.dtype, out)


def _small_heads(call: Any) -> str | None:
    if (call.q_weight is None) != (call.k_weight is None):
        return "takes weights of both norms, or of none"
    if call.qkv.shape[-1] > 3 * call.num_heads * LINEAR_ATTENTION_MOST_HEAD_DIM:
        return f"takes heads of at most {LINEAR_ATTENTION_MOST_HEAD_DIM} channels"
    if call.qkv.stride(-1) != 1 or (call.out is not None and call.out.stride(-1) != 1):
        return "takes qkv and out with contiguous channels"
    return takes_contiguous(call, "q_weight", "k_weight")


relu_linear_attention.triton(dtypes=FLOATS, supports=_small_heads)
relu_linear_attention.native("cpu", dtypes=FLOATS, supports=same_dtype("qkv", "q_weight", "k_weight"))
