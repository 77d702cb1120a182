"""Prompts that end on, before and after the borders of pages and tiles, whole, in pieces and behind a shared
beginning, in one call."""

from collections.abc import Iterator
from itertools import accumulate

import torch

from blip3o_rt.measure.cases import paged_decode_attention as attention_cases
from blip3o_rt.measure.validate.case import DTYPES, Case, int32, random


def case(
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
    cached = attention_cases.case(label, dtype, lengths, q_heads, kv_heads, head_dim, page_size)
    _, k_cache, v_cache, page_table, context_lens, own_scale = cached.arguments
    page_table[:, :shared] = page_table[0, :shared]
    q = random(3, sum(queries), q_heads, head_dim, dtype=dtype, scale=scale)
    starts = int32([0, *accumulate(queries)])
    return Case(label, (q, k_cache, v_cache, page_table, starts, context_lens, own_scale))


def cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for head_dim in (1, 5, 64, 112, 128):
            yield case(f"head_dim {head_dim}", dtype, [33, 9], [33, 4], 4, 2, head_dim, 16)
        for page_size in (1, 4, 20):
            lengths = [1, 15, 16, 17, 40]
            yield case(f"pages of {page_size}", dtype, lengths, lengths, 2, 1, 64, page_size)
        for q_heads, kv_heads in ((1, 1), (6, 2), (5, 1)):
            yield case(f"{q_heads} heads on {kv_heads}", dtype, [66, 31], [66, 30], q_heads, kv_heads, 64, 4)
        for length in (31, 32, 33, 63, 64, 65, 129):
            yield case(f"a prompt of {length}", dtype, [length], [length], 2, 1, 64, 16)
        yield case("pieces of prompts", dtype, [70, 64, 128, 5], [1, 64, 3, 2], 2, 1, 64, 16)
        yield case("a shared beginning", dtype, [70, 65, 90], [6, 1, 26], 4, 2, 64, 16, shared=4)
        yield case("one without queries", dtype, [7, 40, 3], [7, 0, 3], 2, 1, 64, 16)
        yield case("the last of 4,096", dtype, [4096], [3], 2, 1, 64, 16)
        yield case("as Qwen3", dtype, [80, 35], [10, 35], 16, 8, 128, 16)
        yield case("one key dominates", dtype, [64], [64], 2, 1, 64, 16, scale=10.0)
