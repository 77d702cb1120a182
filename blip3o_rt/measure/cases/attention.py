"""Cases of attention."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from blip3o_rt import ops
from blip3o_rt.measure.validate.case import DTYPES, Case, copies, int32, random
from blip3o_rt.measure.validate.finding import Finding, compare
from blip3o_rt.ops.registry import Op

EPS = 1e-5


def append_case(
    label: str,
    dtype: torch.dtype,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    slot_mapping: list[int],
    pages: int = 4,
) -> Case:
    tokens = len(slot_mapping)
    qkv = random(1, tokens, (q_heads + 2 * kv_heads) * head_dim, dtype=dtype)
    angles = random(2, 50, head_dim // 2, scale=3.0)
    cos_sin_cache = torch.cat([angles.cos(), angles.sin()], dim=1)
    positions = int32((7 * t + 49) % 50 for t in range(tokens))
    caches = [random(s, pages, kv_heads, page_size, head_dim, dtype=dtype) for s in (3, 4)]
    weights = [random(s, head_dim, dtype=dtype) for s in (5, 6)]
    return Case(
        label, (qkv, *weights, cos_sin_cache, positions, int32(slot_mapping), *caches, 1e-6), written=(6, 7)
    )


def qk_norm_rope_append_cases() -> Iterator[Case]:
    """Head sizes around the vector lengths, grouped heads, tokens scattered over pages or not written."""
    for dtype in DTYPES:
        for head_dim in (2, 6, 16, 48, 128):
            yield append_case(f"head_dim {head_dim}", dtype, 4, 2, head_dim, 4, [0, 5, 15])
        yield append_case("one head", dtype, 1, 1, 64, 8, [31])
        yield append_case("pages of one token", dtype, 3, 1, 16, 1, [3, 1, 0])
        yield append_case("some not written", dtype, 2, 2, 16, 4, [-1, 3, -1, 4, -1])
        yield append_case("the first slot among some not written", dtype, 2, 2, 16, 4, [-1, 0, -1])
        yield append_case("none written", dtype, 2, 2, 16, 4, [-1, -1])
        yield append_case("as Qwen3", dtype, 16, 8, 128, 16, list(range(12, 40)))
        yield append_case("no tokens", dtype, 2, 1, 16, 4, [])


def paged_case(
    label: str,
    dtype: torch.dtype,
    lengths: list[int],
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    scale: float = 1.0,
) -> Case:
    blocks = max(1, max(-(-length // page_size) for length in lengths))
    pages = len(lengths) * blocks + 1
    order = torch.randperm(pages - 1, generator=torch.Generator().manual_seed(9)) + 1
    page_table = order.to(torch.int32).reshape(len(lengths), blocks)
    caches = [random(s, pages, kv_heads, page_size, head_dim, dtype=dtype) for s in (1, 2)]
    for b, length in enumerate(lengths):  # what lies past a context is garbage that must not be read
        for block in range(blocks):
            used = min(max(length - block * page_size, 0), page_size)
            for cache in caches:
                cache[int(page_table[b, block]), :, used:] = torch.nan
        page_table[b, -(-length // page_size) :] = 2**31 - 1
    q = random(3, len(lengths), q_heads, head_dim, dtype=dtype, scale=scale)
    return Case(label, (q, *caches, page_table, int32(lengths), head_dim**-0.5))


def paged_decode_attention_cases() -> Iterator[Case]:
    """Contexts that end around page borders, shuffled pages with garbage behind, grouped heads."""
    for dtype in DTYPES:
        for page_size in (1, 4, 16, 20):
            yield paged_case(f"pages of {page_size}", dtype, [1, 15, 16, 17, 40], 4, 2, 32, page_size)
        for q_heads, kv_heads in ((1, 1), (2, 2), (6, 2), (8, 1), (5, 1)):
            yield paged_case(f"{q_heads} heads on {kv_heads}", dtype, [9, 3], q_heads, kv_heads, 16, 4)
        for head_dim in (1, 5, 64, 112, 128):
            yield paged_case(f"head_dim {head_dim}", dtype, [33, 8], 4, 2, head_dim, 16)
        yield paged_case("many heads on one, head_dim 128", dtype, [70, 1], 5, 1, 128, 16)
        yield paged_case("4,096 tokens", dtype, [4096, 65], 2, 1, 64, 16)
        yield paged_case("an empty context", dtype, [0, 5, 0], 4, 2, 16, 4)
        yield paged_case("as Qwen3", dtype, [700, 1, 333], 16, 8, 128, 16)
        yield paged_case("one key dominates", dtype, [64], 4, 2, 64, 16, scale=40.0)


def prefill_case(
    label: str,
    dtype: torch.dtype,
    lengths: list[int],
    queries: list[int],
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    shared: int = 0,
    scale: float = 1.0,
) -> Case:
    """Of each context the last queries[b] positions ask; `shared` pages at the beginning are the first
    sequence's."""
    cached = paged_case(label, dtype, lengths, q_heads, kv_heads, head_dim, page_size)
    _, k_cache, v_cache, page_table, context_lens, own_scale = cached.arguments
    page_table[:, :shared] = page_table[0, :shared]
    q = random(3, sum(queries), q_heads, head_dim, dtype=dtype, scale=scale)
    starts = int32([0, *accumulate(queries)])
    return Case(label, (q, k_cache, v_cache, page_table, starts, context_lens, own_scale))


def paged_prefill_attention_cases() -> Iterator[Case]:
    """Prompts that end around borders of pages and tiles, whole, in pieces and behind a shared beginning."""
    for dtype in DTYPES:
        for head_dim in (1, 5, 64, 112, 128):
            yield prefill_case(f"head_dim {head_dim}", dtype, [33, 9], [33, 4], 4, 2, head_dim, 16)
        for page_size in (1, 4, 20):
            lengths = [1, 15, 16, 17, 40]
            yield prefill_case(f"pages of {page_size}", dtype, lengths, lengths, 2, 1, 64, page_size)
        for q_heads, kv_heads in ((1, 1), (6, 2), (5, 1)):
            yield prefill_case(
                f"{q_heads} heads on {kv_heads}", dtype, [66, 31], [66, 30], q_heads, kv_heads, 64, 4
            )
        for length in (31, 32, 33, 63, 64, 65, 129):
            yield prefill_case(f"a prompt of {length}", dtype, [length], [length], 2, 1, 64, 16)
        yield prefill_case("pieces of prompts", dtype, [70, 64, 128, 5], [1, 64, 3, 2], 2, 1, 64, 16)
        yield prefill_case("a shared beginning", dtype, [70, 65, 90], [6, 1, 26], 4, 2, 64, 16, shared=4)
        yield prefill_case("one without queries", dtype, [7, 40, 3], [7, 0, 3], 2, 1, 64, 16)
        yield prefill_case("the last of 4,096", dtype, [4096], [3], 2, 1, 64, 16)
        yield prefill_case("as Qwen3", dtype, [80, 35], [10, 35], 16, 8, 128, 16)
        yield prefill_case("one key dominates", dtype, [64], [64], 2, 1, 64, 16, scale=10.0)


def decode_case(
    label: str,
    dtype: torch.dtype,
    lengths: list[int],
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    unwritten: tuple[int, ...] = (),
) -> Case:
    """A token at the end of each context; `unwritten`: sequences whose token is not to be written."""
    cached = paged_case(label, dtype, lengths, q_heads, kv_heads, head_dim, page_size)
    _, k_cache, v_cache, page_table, context_lens, scale = cached.arguments
    slot_mapping = []
    for b, length in enumerate(lengths):
        if b in unwritten:
            slot_mapping.append(-1)
            continue
        page, offset = int(page_table[b, (length - 1) // page_size]), (length - 1) % page_size
        slot_mapping.append(page * page_size + offset)
        for cache in (k_cache, v_cache):
            cache[page, :, offset] = torch.nan
    qkv = random(4, len(lengths), (q_heads + 2 * kv_heads) * head_dim, dtype=dtype)
    weights = [1 + random(seed, head_dim, scale=0.3) for seed in (5, 6)]
    angles = random(7, max(lengths) + 1, head_dim // 2, scale=3.0)
    cos_sin_cache = torch.cat([angles.cos(), angles.sin()], dim=1)
    positions = (context_lens - 1).clamp(min=0)
    return Case(
        label,
        (
            qkv,
            *(weight.to(dtype) for weight in weights),
            cos_sin_cache,
            positions,
            int32(slot_mapping),
            k_cache,
            v_cache,
            page_table,
            context_lens,
            1e-6,
            scale,
        ),
        written=(6, 7),
    )


def decode_attention_check(
    op: Op[Any, Any], case: Case, results: list[Tensor], exact: list[Tensor]
) -> list[Finding]:
    """The exact attention is that of the query, the keys and the values as they were rounded."""
    arguments, _ = copies(case)
    *token, page_table, context_lens, eps, scale = arguments
    query = ops.qk_norm_rope_append.reference(*(*token, eps))
    k_cache, v_cache = (cache.double() for cache in token[-2:])
    attended = ops.paged_decode_attention.reference(
        query.double(), k_cache, v_cache, page_table, context_lens, scale
    )
    return compare(op, case, results, [attended, *exact[1:]])


def decode_attention_cases() -> Iterator[Case]:
    """New tokens at the ends of pages and splits, with garbage from their own slot on; some not written."""
    for dtype in DTYPES:
        for page_size in (1, 4, 16, 20):
            yield decode_case(f"pages of {page_size}", dtype, [1, 15, 16, 17, 40], 4, 2, 64, page_size)
        for q_heads, kv_heads in ((1, 1), (6, 2), (16, 1), (17, 1)):
            yield decode_case(f"{q_heads} heads on {kv_heads}", dtype, [9, 65], q_heads, kv_heads, 64, 4)
        for head_dim in (2, 48, 64, 128):
            yield decode_case(f"head_dim {head_dim}", dtype, [33, 1, 64], 4, 2, head_dim, 16)
        yield decode_case("ends of splits", dtype, [63, 64, 65, 128, 129], 2, 1, 64, 16)
        yield decode_case("4,096 tokens", dtype, [4096, 65], 2, 1, 64, 16)
        yield decode_case("as Qwen3", dtype, [130, 1, 65], 16, 8, 128, 16)
        yield decode_case(
            "some not written, one with no context", dtype, [5, 70, 0], 4, 2, 64, 16, unwritten=(1, 2)
        )


def cross_case(
    label: str,
    dtype: torch.dtype,
    tokens: int = 33,
    keys: int = 9,
    heads: int = 3,
    head_dim: int = 16,
    *,
    norm: bool = True,
    counts: tuple[int, ...] = (),
    query_scale: float = 1.0,
    key_scale: float = 1.0,
) -> Case:
    query = random(1, tokens, heads * head_dim, dtype=dtype, scale=query_scale)
    key = random(2, heads, keys, head_dim, dtype=dtype, scale=key_scale)
    value = random(3, heads, keys, head_dim, dtype=dtype)
    weight = (1 + random(4, heads * head_dim, scale=0.3)).to(dtype) if norm else None
    options = {"log_multiplicity": torch.tensor(counts).log()} if counts else {}
    return Case(label, (query, key, value, weight, EPS), options)


def cross_attention_cases() -> Iterator[Case]:
    """Head counts and widths, one key and many, keys that stand for many, logits that let one key win."""
    for dtype in DTYPES:
        for heads, head_dim in ((1, 1), (1, 8), (5, 7), (2, 112), (3, 64)):
            yield cross_case(f"{heads} heads of {head_dim}", dtype, heads=heads, head_dim=head_dim)
        for keys in (1, 2, 16, 17, 384, 385, 730, 3001):
            yield cross_case(f"{keys} keys", dtype, keys=keys)
        for tokens in (1, 15, 130):
            yield cross_case(f"{tokens} tokens", dtype, tokens=tokens)
        yield cross_case("no norm", dtype, norm=False)
        yield cross_case("two keys for 730 and 1024", dtype, keys=2, counts=(730, 1024))
        yield cross_case("four counts, no norm", dtype, keys=4, counts=(1, 10**6, 3, 1), norm=False)
        yield cross_case("counts of 500 keys", dtype, keys=500, counts=tuple(range(1, 501)))
        yield cross_case("keys that do not count", dtype, keys=140, counts=(0,) * 70 + (1,) * 70)
        yield cross_case("eps shows", dtype, query_scale=3e-3)
        yield cross_case("one key wins", dtype, key_scale=30.0)
        given = cross_case("given out", dtype)
        out = random(5, 33, 48, dtype=dtype)
        yield Case("given out", given.arguments, {"out": out}, written=("out",))
        key, value = (random(seed, 9, 3, 16, dtype=dtype).transpose(0, 1) for seed in (6, 7))
        query, weight = random(8, 33, 48, dtype=dtype), random(9, 48, dtype=dtype)
        yield Case("keys token by token in memory", (query, key, value, weight, EPS))


def relu_norm_weights(width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    q_weight, k_weight = (1 + random(seed, width, scale=0.3) for seed in (11, 12))
    return q_weight.to(dtype), k_weight.to(dtype)


def relu_case(
    label: str, dtype: torch.dtype, batch: int, tokens: int, heads: int, head_dim: int, *, norm: bool = True
) -> Case:
    width = heads * head_dim
    norms = relu_norm_weights(width, dtype) if norm else (None, None)
    return Case(label, (random(1, batch, tokens, 3 * width, dtype=dtype), *norms, heads, EPS))


def relu_linear_attention_cases() -> Iterator[Case]:
    """Head counts and widths, one token and many, with and without norms, queries that meet no key, NaN."""
    for dtype in DTYPES:
        for heads, head_dim in ((1, 1), (1, 8), (3, 5), (7, 32), (2, 64)):
            name = f"{heads} heads of {head_dim}"
            yield relu_case(name, dtype, 2, 35, heads, head_dim)
            yield relu_case(f"{name}, no norms", dtype, 2, 35, heads, head_dim, norm=False)
        norms = relu_norm_weights(64, dtype)
        for tokens in (1, 2, 33, 1024):
            yield relu_case(f"{tokens} tokens", dtype, 1, tokens, 2, 32)
        yield relu_case("4200 tokens", dtype, 1, 4200, 1, 16)
        yield Case("eps shows", (random(3, 2, 9, 192, dtype=dtype, scale=3e-3), *norms, 2, EPS))
        deaf = random(4, 2, 9, 192, dtype=dtype)
        deaf[:, :4, :64] = -deaf[:, :4, :64].abs()  # queries of which the ReLU leaves nothing
        yield Case("queries that meet no key", (deaf, *norms, 2, EPS))
        unseen = random(5, 2, 9, 192, dtype=dtype)
        unseen[..., 64:96] = -unseen[..., 64:96].abs()  # no token has a key for the first head
        yield Case("a head without keys", (unseen, *norms, 2, EPS))
        broken = random(9, 2, 9, 192, dtype=dtype)
        broken[0, 4, 64 + 3] = torch.nan  # a key of the first image's first head: all of that head
        broken[1, 2, 32 + 5] = torch.nan  # a query of the second image's second head: that token of it
        yield Case("not a number", (broken, None, None, 2, EPS))
        out = random(6, 2, 9, 64, dtype=dtype)
        given = random(7, 2, 9, 192, dtype=dtype)
        yield Case("given out", (given, *norms, 2, EPS), {"out": out}, written=("out",))
