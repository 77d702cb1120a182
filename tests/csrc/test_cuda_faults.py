"""Faults planted in the CUDA kernels are caught by the cases of their op, run on the CPU."""

from __future__ import annotations

from typing import Any

import pytest

from blip3o_rt.ops import native
from tests.csrc.simt.build import CSRC, SimtCompiler, source_of
from tests.csrc.simt.cases import errors, examples

HEADERS = ("split_attention.h", "norm_and_rotate.h")  # with kernels in them

FAULTS = {
    "rms_norm": [
        ("__syncthreads();", ""),  # a dropped barrier
        ("__syncthreads();", "if (threadIdx.x < 64) __syncthreads();"),  # a barrier that some never reach
        ("value +=", "if (distance > 1) value +="),  # a lane left out of the sum
        ("warp < kWarps;", "warp < kWarps - 1;"),
        ("from_float<T>(bias ? value + to_float(b.element[e]) : value)", "from_float<T>(value)"),
    ],
    "silu_mul": [
        ("from + a.out.width", "from + a.out.width - 1"),
        ("if (column >= a.out.width) return;", "if (column + kPack >= a.out.width) return;"),
        ("expf(-x)", "expf(x)"),
    ],
    "qk_norm_rope_append": [
        ("a * cosine.element[e] - b * sine.element[e]", "a * cosine.element[e] + b * sine.element[e]"),
        ("sum_over_lanes(squares)", "squares"),
        ("* page_size + slot % page_size", "* page_size + (slot + 1) % page_size"),
        ("head < q_heads + kv_heads;", "head <= q_heads + kv_heads;"),
    ],
    "paged_decode_attention": [
        ("__syncthreads();\n        merge_warps", "merge_warps"),
        ("parts[g % 2]", "parts[0]"),  # the next head's sums over those that are still being read
        (
            "distance = D::kLanesPerKey; distance < kWarp;",
            "distance = D::kLanesPerKey; distance < kWarp / 2;",
        ),
        ("const float scale = expf(parts.largest[w] - largest);", "const float scale = 1.0f;"),
        ("(length + kSplit - 1) / kSplit", "(length + kSplit) / kSplit"),
        ("a.block_table[sequence * a.max_blocks + key / page_size]", "a.block_table[key / page_size]"),
        (  # the last split instead of the last block to arrive
            "atomicInc(&partials.arrived[sequence * a.cache.kv_heads + kv_head], ticket) == ticket",
            "blockIdx.x == ticket",
        ),
        ("    __syncthreads();\n    if (!last) return;", "    if (!last) return;"),
    ],
    "decode_attention": [
        ("= value[threadIdx.x];\n    __syncthreads();", "= value[threadIdx.x];"),
        ("newest >= first_key", "newest > first_key"),
        ("head < group + has_newest;", "head < group;"),
        ("group + has_newest; head += warps", "group + has_newest; head += warps + 1"),
        ("value = key + token.cache.kv_heads * kHeadDim", "value = key + kHeadDim"),
        ("store_pack(static_cast<T*>(a.cache.v) + offset, v[s]);", ""),
        ("if (slot < 0 || length <= 0) return slot == -1;", "if (slot < 0) return false;"),
        ("is_key ? token.k_weight : token.q_weight", "token.q_weight"),
    ],
    "row_linear": [
        ("__syncthreads();\n        finish_tile", "finish_tile"),
        ("first_row);\n        __syncthreads();", "first_row);"),
        ("last ? 0 : slice + 1", "slice + 1"),
        ("w < warps;", "w < warps - 1;"),
        ("{low[2], high[2], low[3], high[3]}", "{low[2], low[3], high[2], high[3]}"),
        ("a.x, first_row + g * kGroupRows,", "a.x, first_row,"),
    ],
    "advance_rows": [
        ("position > 0 && position < a.max_blocks * page_size", "position < a.max_blocks * page_size"),
        ("position < a.max_blocks * page_size", "position <= a.max_blocks * page_size"),
        ("a.kept[place] = draw;", "a.kept[place] = a.out[row];"),
        ("draw < 0 ? 0 : draw", "draw"),
        ("int64_t{blockIdx.x} * kThreads + threadIdx.x", "threadIdx.x"),
    ],
    "sample_tokens": [
        ("__syncthreads();\n    if (threadIdx.x == 0) shared.search", "if (threadIdx.x == 0) shared.search"),
        ("before + inside >= search.limit", "before + inside > search.limit"),
        ("if (lane >= distance) sum += below;", "sum += below;"),
        ("a.rank == 0 || b.score > a.score", "b.score > a.score"),
        ("logit == 0.0f ? 0.0f : logit", "logit"),
        ("chunk.count = range.high == 0 ? 0 : -1;", "chunk.count = 0;"),
        ("piece -= pieces;", ""),
    ],
}


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> SimtCompiler:
    return SimtCompiler(tmp_path_factory.mktemp("faults"))


def whole_source_of(op: str) -> str:
    """The text of an op's .cu file, with headers that have kernels in them in their places."""
    source = source_of(op)
    for header in HEADERS:
        source = source.replace(f'#include "cuda/{header}"', (CSRC / "cuda" / header).read_text())
    return source


def is_wrong(op: str, kernels: Any) -> bool:
    """Whether a case gives a wrong result, or never ends, in one of the two orders of threads."""
    for case, exact in examples(op):
        for descending in (False, True):
            kernels.set_descending(descending)
            try:
                if errors(op, case, exact):
                    return True
            except RuntimeError:
                return True
    return False


@pytest.mark.parametrize(
    ("op", "index"), [pytest.param(op, i, id=f"{op}-{i}") for op in FAULTS for i in range(len(FAULTS[op]))]
)
def test_planted_faults_are_caught(
    compiler: SimtCompiler, monkeypatch: pytest.MonkeyPatch, op: str, index: int
) -> None:
    correct, fault = FAULTS[op][index]
    source = whole_source_of(op)
    assert correct in source
    kernels = compiler.build(op, source.replace(correct, fault), f"{op}_{index}")
    monkeypatch.setattr(native, "cuda", lambda: kernels)
    assert is_wrong(op, kernels)
