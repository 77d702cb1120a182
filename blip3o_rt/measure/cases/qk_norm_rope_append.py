"""Head sizes around the vector lengths, grouped heads, tokens scattered over pages or not written at all."""

from collections.abc import Iterator

import torch

from blip3o_rt.measure.validate.case import DTYPES, Case, int32, random


def case(
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


def cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for head_dim in (2, 6, 16, 48, 128):
            yield case(f"head_dim {head_dim}", dtype, 4, 2, head_dim, 4, [0, 5, 15])
        yield case("one head", dtype, 1, 1, 64, 8, [31])
        yield case("pages of one token", dtype, 3, 1, 16, 1, [3, 1, 0])
        yield case("some not written", dtype, 2, 2, 16, 4, [-1, 3, -1, 4, -1])
        yield case("the first slot among some not written", dtype, 2, 2, 16, 4, [-1, 0, -1])
        yield case("none written", dtype, 2, 2, 16, 4, [-1, -1])
        yield case("as Qwen3", dtype, 16, 8, 128, 16, list(range(12, 40)))
        yield case("no tokens", dtype, 2, 1, 16, 4, [])
