"""Contexts that end on, before and after page borders, shuffled pages with garbage behind, grouped heads."""

from collections.abc import Iterator

import torch

from blip3o_rt.measure.validate.case import DTYPES, Case, int32, random


def case(
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


def cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for page_size in (1, 4, 16, 20):
            yield case(f"pages of {page_size}", dtype, [1, 15, 16, 17, 40], 4, 2, 32, page_size)
        for q_heads, kv_heads in ((1, 1), (2, 2), (6, 2), (8, 1), (5, 1)):
            yield case(f"{q_heads} heads on {kv_heads}", dtype, [9, 3], q_heads, kv_heads, 16, 4)
        for head_dim in (1, 5, 64, 112, 128):
            yield case(f"head_dim {head_dim}", dtype, [33, 8], 4, 2, head_dim, 16)
        yield case("many heads on one, head_dim 128", dtype, [70, 1], 5, 1, 128, 16)
        yield case("4,096 tokens", dtype, [4096, 65], 2, 1, 64, 16)
        yield case("an empty context", dtype, [0, 5, 0], 4, 2, 16, 4)
        yield case("as Qwen3", dtype, [700, 1, 333], 16, 8, 128, 16)
        yield case("one key dominates", dtype, [64], 4, 2, 64, 16, scale=40.0)
