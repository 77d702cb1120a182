"""ReLU linear attention: q . sum_m(k_m v_m) / (q . sum_m(k_m) + 1e-15) per head, q, k = relu(rms_norm(.)).

Three kernels, each reduction in a fixed order that the number of tokens alone decides:
  1. the RMS of every token's keys over all heads (only with norms). q needs none: its factor is positive, so
     it passes the ReLU and cancels in the quotient, but for its share of the 1e-15;
  2. per image, head and chunk of tokens: the float32 sums of k v^T and of k;
  3. per image, head and block of tokens: the chunks' sums added up, then the quotient.
Tiling   tokens in blocks of 64, chunks of at least 256 tokens and at most 16 of them; a head's channels are
         padded to a power of two of at least 16; lanes beyond tokens and channels are masked.
Bytes    qkv once and its keys once more, out once, and the chunks' sums, 4 (d^2 + d) each, written once and
         read by every block of tokens. For 2 x 1024 tokens, 70 heads of 32, bfloat16: 46 MB, and the sums
         2.4 MB written and 38 MB read from the second-level cache.
FLOPs    4 d (d + 1) per token and head (0.6 GFLOP there); in bfloat16 3 and 6 times that on the matrix units.
Bound    memory.
To tune  Chunks for heads of 32, whose states are too narrow for the wide products of sm_90 and use those of
         sm_80.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .inverse_rms import inverse_rms
from .launch import block_of, options
from .products import add_narrow_product, add_product

BLOCK_TOKENS = 64
CHUNK_TOKENS, MOST_CHUNKS = 256, 16


@triton.jit
def _states(
    qkv,
    k_weight,
    factors,
    states,
    tokens,
    chunk,
    qkv_batch,
    qkv_row,
    heads: tl.constexpr,
    head_dim: tl.constexpr,
    block_tokens: tl.constexpr,
    block_dim: tl.constexpr,
    exact: tl.constexpr,
):
    """states [B, heads, chunks, block_dim + 1, block_dim]: sums of k v^T, and in the last row of k."""
    head, part, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    width: tl.constexpr = heads * head_dim
    channel = tl.arange(0, block_dim)
    known = channel < head_dim
    keys = qkv + batch.to(tl.int64) * qkv_batch + width + head * head_dim
    state = tl.zeros((block_dim, block_dim), tl.float32)
    total = tl.zeros((block_dim,), tl.float32)
    if k_weight is not None:
        weight = tl.load(k_weight + head * head_dim + channel, mask=known, other=0.0).to(tl.float32)
    for first in range(part * chunk, min((part + 1) * chunk, tokens), block_tokens):
        token = first + tl.arange(0, block_tokens)
        inside = (token < tokens)[:, None] & known[None, :]
        place = keys + token.to(tl.int64)[:, None] * qkv_row + channel[None, :]
        k = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(place + width, mask=inside, other=0.0)
        if k_weight is not None:
            factor = tl.load(factors + batch * tokens + token, mask=token < tokens, other=0.0)
            k = k * factor[:, None] * weight[None, :]
        k = tl.where(k < 0, 0.0, k)  # keeps NaN, which a maximum drops
        total += tl.sum(k, axis=0)
        state = add_narrow_product(state, tl.trans(k), v, exact)
    place = states + ((batch * heads + head) * tl.num_programs(1) + part) * (block_dim + 1) * block_dim
    tl.store(place + channel[:, None] * block_dim + channel[None, :], state)
    tl.store(place + block_dim * block_dim + channel, total)


@triton.jit
def _attend(
    qkv,
    q_weight,
    states,
    out,
    tokens,
    chunks,
    qkv_batch,
    qkv_row,
    out_batch,
    out_row,
    heads: tl.constexpr,
    head_dim: tl.constexpr,
    block_tokens: tl.constexpr,
    block_dim: tl.constexpr,
    exact: tl.constexpr,
):
    head, batch = tl.program_id(1), tl.program_id(2)
    token = tl.program_id(0) * block_tokens + tl.arange(0, block_tokens)
    channel = tl.arange(0, block_dim)
    square = channel[:, None] * block_dim + channel[None, :]
    inside = (token < tokens)[:, None] & (channel < head_dim)[None, :]
    state = tl.zeros((block_dim, block_dim), tl.float32)
    total = tl.zeros((block_dim,), tl.float32)
    place = states + (batch * heads + head) * chunks * (block_dim + 1) * block_dim
    for _ in range(chunks):
        state += tl.load(place + square)
        total += tl.load(place + block_dim * block_dim + channel)
        place += (block_dim + 1) * block_dim
    column = head * head_dim + channel
    rows = token.to(tl.int64)[:, None]
    q = tl.load(
        qkv + batch.to(tl.int64) * qkv_batch + rows * qkv_row + column[None, :], mask=inside, other=0.0
    )
    q = q.to(tl.float32)
    if q_weight is not None:
        weight = tl.load(q_weight + column, mask=channel < head_dim, other=0.0).to(tl.float32)
        q *= weight[None, :]
    q = tl.where(q < 0, 0.0, q)
    attended = add_product(tl.zeros((block_tokens, block_dim), tl.float32), q, state, exact)
    attended /= (tl.sum(q * total[None, :], axis=1) + 1e-15)[:, None]
    place = out + batch.to(tl.int64) * out_batch + rows * out_row + column[None, :]
    tl.store(place, attended.to(out.dtype.element_ty), mask=inside)


def relu_linear_attention(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, num_heads: int, eps: float, out: Tensor
) -> None:
    """qkv [B, N, 3 D] and out [B, N, D] with contiguous channels; weights [D] contiguous, both or none."""
    batch, tokens, _ = qkv.shape
    width = out.shape[2]
    head_dim = width // num_heads
    block_dim = block_of(head_dim, least=16)
    chunk = max(CHUNK_TOKENS, block_of(triton.cdiv(tokens, MOST_CHUNKS)))
    chunks = triton.cdiv(tokens, chunk)
    factors = None if k_weight is None else inverse_rms(qkv[..., width : 2 * width], eps)
    states = torch.empty(
        (batch, num_heads, chunks, block_dim + 1, block_dim), dtype=torch.float32, device=qkv.device
    )
    constants = {
        "heads": num_heads,
        "head_dim": head_dim,
        "block_tokens": BLOCK_TOKENS,
        "block_dim": block_dim,
        "exact": qkv.dtype == torch.float32,
        **options(num_warps=4),
    }
    _states[(num_heads, chunks, batch)](
        qkv, k_weight, factors, states, tokens, chunk, qkv.stride(0), qkv.stride(1), **constants
    )
    _attend[(triton.cdiv(tokens, BLOCK_TOKENS), num_heads, batch)](
        qkv,
        q_weight,
        states,
        out,
        tokens,
        chunks,
        qkv.stride(0),
        qkv.stride(1),
        out.stride(0),
        out.stride(1),
        **constants,
    )
