"""Attention to cached keys: softmax(q k^T / sqrt(d) + log_multiplicity) v per head, q = rms_norm(query).

Two kernels: the RMS of every query over all heads (only with a norm), then per head and block of queries an
online softmax over blocks of keys, with the largest logit so far and the sums in float32. In bfloat16 models
q and the weights of the values are rounded to bfloat16, as the published code rounds them, and the scale and
the logits, in powers of two, are float32; in float32 models nothing is rounded.
Tiling   64 queries by 64 keys (by 16 where there are no more: an edit's two unconditional keys), in
         float32 half of either; the head's channels are padded to a power of two (112 to 128) and masked.
Bytes    query twice, out once, keys and values once per block of queries, from the second-level cache: for
         1024 queries of 20 x 112 and 730 keys in bfloat16 20 MB from memory, 105 MB from the cache.
FLOPs    4 d per query and key (6.7 GFLOP there), in bfloat16 on the matrix units.
Bound    the matrix units and the softmax alike: a block of keys is 512 clocks of theirs, and some 560
         instructions of every warp, one a clock on each scheduler; one program's hide behind the other's.
To tune  186 registers and 80 KB leave two programs on a multiprocessor. 128 queries by 8 warps (209, 96 KB)
         leave one, with a seventh fewer instructions a query, but 132 multiprocessors share 160 programs less
         evenly than 320. 32 keys (155, 48 KB) leave three, so that all 320 run at once, but scale the sums
         twice as often: 720 instructions for 64 keys. A third stage (112 KB) still leaves two, but one block
         ahead is enough.
"""

import triton
import triton.language as tl
from torch import Tensor

from .inverse_rms import inverse_rms
from .launch import block_of, options

BLOCK_QUERIES, BLOCK_KEYS = 64, 64
LOG2_E = tl.constexpr(1.4426950408889634)  # powers of two are an instruction, those of e are several


@triton.jit
def _cross_attention(
    query,
    key,
    value,
    query_weight,
    factors,
    log_multiplicity,
    out,
    tokens,
    keys,
    query_row,
    key_head,
    key_row,
    value_head,
    value_row,
    out_row,
    scale: tl.constexpr,
    head_dim: tl.constexpr,
    block_queries: tl.constexpr,
    block_keys: tl.constexpr,
    block_dim: tl.constexpr,
):
    head = tl.program_id(1)
    token = tl.program_id(0) * block_queries + tl.arange(0, block_queries)
    channel = tl.arange(0, block_dim)
    known = channel < head_dim
    inside = (token < tokens)[:, None] & known[None, :]
    rows = token.to(tl.int64)[:, None]
    column = head * head_dim + channel
    q = tl.load(query + rows * query_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if query_weight is not None:
        weight = tl.load(query_weight + column, mask=known, other=0.0).to(tl.float32)
        q *= tl.load(factors + token, mask=token < tokens, other=0.0)[:, None] * weight[None, :]
    q = q.to(key.dtype.element_ty)
    # The lowest number: from -inf on, a first block without a key that counts would give inf - inf.
    largest = tl.full((block_queries,), -3.4028234663852886e38, tl.float32)
    total = tl.zeros((block_queries,), tl.float32)
    attended = tl.zeros((block_queries, block_dim), tl.float32)
    head_keys, head_values = key + head.to(tl.int64) * key_head, value + head.to(tl.int64) * value_head
    for first in range(0, keys, block_keys):
        index = first + tl.arange(0, block_keys)
        present = index < keys
        mask = present[:, None] & known[None, :]
        k = tl.load(head_keys + index[:, None] * key_row + channel[None, :], mask=mask, other=0.0)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2_E)
        if log_multiplicity is not None:
            logits += LOG2_E * tl.load(log_multiplicity + index, mask=present, other=0.0)[None, :]
        logits = tl.where(present[None, :], logits, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(logits, axis=1))
        kept = tl.exp2(largest - new_largest)
        attended *= kept[:, None]
        p = tl.exp2(logits - new_largest[:, None])
        total = total * kept + tl.sum(p, axis=1)
        v = tl.load(head_values + index[:, None] * value_row + channel[None, :], mask=mask, other=0.0)
        attended = tl.dot(p.to(v.dtype), v, attended, input_precision="ieee")
        largest = new_largest
    attended /= total[:, None]
    tl.store(out + rows * out_row + column[None, :], attended.to(out.dtype.element_ty), mask=inside)


def cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_weight: Tensor | None,
    eps: float,
    log_multiplicity: Tensor | None,
    out: Tensor,
) -> None:
    """query and out [N, H d], key and value [H, M, d], all with contiguous channels and of one dtype.

    query_weight [H d] or None, log_multiplicity fp32 [M] or None, contiguous.
    """
    heads, keys, head_dim = key.shape
    wide = query.dtype.itemsize == 4
    block_queries = BLOCK_QUERIES // 2 if wide else BLOCK_QUERIES
    _cross_attention[(triton.cdiv(len(query), block_queries), heads)](
        query,
        key,
        value,
        query_weight,
        None if query_weight is None else inverse_rms(query[None], eps),
        log_multiplicity,
        out,
        len(query),
        keys,
        query.stride(0),
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        out.stride(0),
        scale=head_dim**-0.5,
        head_dim=head_dim,
        block_queries=block_queries,
        block_keys=16 if keys <= 16 else (BLOCK_KEYS // 2 if wide else BLOCK_KEYS),
        block_dim=block_of(head_dim, least=16),
        **options(num_warps=8 if wide else 4),
    )
