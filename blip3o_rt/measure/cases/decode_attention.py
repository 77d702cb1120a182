"""New tokens at the first and last places of pages and splits, over pages with garbage from the token's own
place on; some that are not written."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from blip3o_rt import ops
from blip3o_rt.measure.cases import paged_decode_attention as attention_cases
from blip3o_rt.measure.validate.case import DTYPES, Case, copies, int32, random
from blip3o_rt.measure.validate.finding import Finding, compare
from blip3o_rt.ops.registry import Op


def case(
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
    cached = attention_cases.case(label, dtype, lengths, q_heads, kv_heads, head_dim, page_size)
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


def check(op: Op[Any, Any], case: Case, results: list[Tensor], exact: list[Tensor]) -> list[Finding]:
    """The exact attention is that of the query, the keys and the values as they were rounded."""
    arguments, _ = copies(case)
    *token, page_table, context_lens, eps, scale = arguments
    query = ops.qk_norm_rope_append.reference(*(*token, eps))
    k_cache, v_cache = (cache.double() for cache in token[-2:])
    attended = ops.paged_decode_attention.reference(
        query.double(), k_cache, v_cache, page_table, context_lens, scale
    )
    return compare(op, case, results, [attended, *exact[1:]])


def cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for page_size in (1, 4, 16, 20):
            yield case(f"pages of {page_size}", dtype, [1, 15, 16, 17, 40], 4, 2, 64, page_size)
        for q_heads, kv_heads in ((1, 1), (6, 2), (16, 1), (17, 1)):
            yield case(f"{q_heads} heads on {kv_heads}", dtype, [9, 65], q_heads, kv_heads, 64, 4)
        for head_dim in (2, 48, 64, 128):
            yield case(f"head_dim {head_dim}", dtype, [33, 1, 64], 4, 2, head_dim, 16)
        yield case("ends of splits", dtype, [63, 64, 65, 128, 129], 2, 1, 64, 16)
        yield case("4,096 tokens", dtype, [4096, 65], 2, 1, 64, 16)
        yield case("as Qwen3", dtype, [130, 1, 65], 16, 8, 128, 16)
        yield case("some not written, one with no context", dtype, [5, 70, 0], 4, 2, 64, 16, unwritten=(1, 2))
