"""Faults planted in the CUDA kernels are caught by the cases of their op, run on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from blip3o_rt.ops import native
from blip3o_rt.ops.scratch import Scratch
from tests.csrc.simt.build import CSRC, SimtCompiler, source_of
from tests.csrc.simt.cases import PAGED, errors, examples, unseen_pages
from tests.planting import plant

pytestmark = pytest.mark.exhaustive

# With parts of kernels in them.
HEADERS = ("split_attention.h", "arrival.h", "norm_and_rotate.h", "paged_context.h", "e4m3.h", "silu.h")

# What is read out of a ring before it is there.
WAIT_AND_READ = """wait_for_copies<kStages - 1>();
        const Words* slots = ring_ + stage_ * kCopies * kWarp;"""
READ_AND_WAIT = """Words slots[kCopies * kWarp];
        for (int i = 0; i < kCopies; ++i) slots[i * kWarp] = ring_[(stage_ * kCopies + i) * kWarp];
        wait_for_copies<kStages - 1>();"""

FAULTS = {
    "rms_norm": [
        ("__syncthreads();", ""),  # a dropped barrier
        ("__syncthreads();", "if (threadIdx.x < 64) __syncthreads();"),  # a barrier that some never reach
        ("squares = sum_over_lanes(squares);", "squares = sum_over_lanes<16>(squares);"),
        ("threadIdx.x % kWarp == 0", "threadIdx.x == 0"),  # the sum of one warp alone
        ("from_float<T>(bias ? value + to_float(b.element[e]) : value)", "from_float<T>(value)"),
    ],
    "rms_norm_keep": [
        ("__syncthreads();", ""),
        ("if (keeps) kept[i]", "if (keeps && i > 0) kept[i]"),
        ("if (keeps) kept[i] = result;", "if (keeps) kept[i] = x[i];"),
        ("slot < a.kept.count", "slot + 1 < a.kept.count"),
        ("slot * a.kept.stride", "row * a.kept.stride"),
        ("slot * a.kept.stride", "slot * a.out.stride"),
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
        ("if (first > 0) __syncthreads();", ""),  # sums over those that are still being read
        (
            "distance < kWarp; distance *= 2) {\n#pragma unroll\n        for (int h",
            "distance < kWarp / 2; distance *= 2) {\n#pragma unroll\n        for (int h",
        ),
        ("i < kHeadsAtOnce * (D::kPack + 1);", "i < D::kPack + 1;"),  # one head's sums of the lanes
        ("const float scale = expf(part.largest[w] - largest);", "const float scale = 1.0f;"),
        ("(length + kSplit - 1) / kSplit", "(length + kSplit) / kSplit"),
        ("total *= rescale;", ""),  # splits beyond the first round
        ("a.page_table + sequence * a.max_pages + own", "a.page_table + own"),
        # The last split instead of the last block to arrive.
        ("count_arrival(arrived, ticket) == ticket", "blockIdx.x == ticket"),
        ("__syncthreads();\n    return last;", "return last;"),
        ("page >= 0 && page < a.cache.pages;", "page < a.cache.pages;"),
        ("page >= 0 && page < a.cache.pages;", "page >= 0;"),
        ('if (own.missing >> s & 1) score = nanf("");', ""),
        ('dot = rows[p] < 0 ? nanf("") : 0.0f;', "dot = 0.0f;"),
    ],
    "paged_prefill_attention": [
        (
            "load_tile(tile, a, queries.sequence, kv_head, first_key, keys);\n        __syncthreads();",
            "load_tile(tile, a, queries.sequence, kv_head, first_key, keys);",
        ),
        (
            "add_values(carried, scores, tile, lane);\n        __syncthreads();",
            "add_values(carried, scores, tile, lane);",
        ),
        ("<= last_key[half] ? score", "< last_key[half] ? score"),
        ("carried.total[half] *= rescale;", ""),
        ("mma_m16n8k16(carried.sums[n + i], low,", "if (n < 0) mma_m16n8k16(carried.sums[n + i], low,"),
        ("lane % 16][8 * n + lane / 16 * 8]", "lane % 16][8 * n]"),
        (
            "distance < 4; distance *= 2) {\n            largest",
            "distance < 2; distance *= 2) {\n            largest",
        ),
        ("block -= blocks;", "block -= blocks - 1;"),
        ("place.first_row + kRows - 1 : rows - 1", "place.first_row + kRows - 1 : rows - 2"),
        ("queries.first_position + token - queries.first_token;", "queries.first_position;"),
        ('if (row < 0) k.element[0] = from_float<bfloat>(nanf(""));', ""),
        ('inside ? row < 0 ? nanf("") : 0.0f : -INFINITY', "inside ? 0.0f : -INFINITY"),
    ],
    "decode_attention": [
        ("= value[threadIdx.x];\n    __syncthreads();", "= value[threadIdx.x];"),
        ("newest >= first_key", "newest > first_key"),
        ("head < group + has_newest;", "head < group;"),
        ("group + has_newest; head += warps", "group + has_newest; head += warps + 1"),
        ("value = key + token.cache.kv_heads * kHeadDim", "value = key + kHeadDim"),
        ("store_pack(static_cast<T*>(a.cache.v) + offset, own.v[s]);", ""),
        ("if (place.slot < 0 || length <= 0) return place.slot == -1;", "if (place.slot < 0) return false;"),
        ("            ++entry;\n", ""),
        ("is_key ? token.k_weight : token.q_weight", "token.q_weight"),
    ],
    "row_linear": [
        ("__syncthreads();\n        finish_tile", "finish_tile"),
        ("first_row, gated);\n        __syncthreads();", "first_row, gated);"),
        ("slice = 0;\n", ""),  # a tile that begins where the last one ended
        ("wait_for_copies<kStages - 1>();", ""),
        ("wait_for_copies<kStages - 1>();", "wait_for_copies<kStages>();"),
        (WAIT_AND_READ, READ_AND_WAIT),
        ("slots = ring_ + stage_ *", "slots = ring_ + (stage_ + 1) % kStages *"),
        ("stage_ == 0 ? kStages - 1 : stage_ - 1", "stage_"),  # over what is read next
        ("stage < kStages - 1; ++stage", "stage < kStages; ++stage"),
        ("commit_copies();", ""),
        ("ring_ + stage * kCopies * kWarp", "ring_ + stage * kCopies"),  # over other lanes
        (
            "skipped < from.low_left",
            "skipped + kLaneWidth<Weight> < from.low_left",
        ),  # a lost tail
        ("w < warps;", "w < warps - 1;"),
        ("{low.word[0], high.word[0],", "{high.word[0], low.word[0],"),
        ("a, first_row + g * kGroupRows,", "a, first_row,"),
    ],
    "row_linear_w8": [
        ("words.element[four], 0, 0x4342", "words.element[four], 0, 0x4140"),
        ("if (a.scale) sum *= a.scale[column];", ""),
        ("a.scale[column]", "a.scale[0]"),
        ("piece * 8;", "piece * 0;"),  # the lane's first channels of x for all of its weight
        ("chunk = (2 * first + i) /", "chunk = i /"),
        ("words.element[four], 0, 0x3424", "words.element[four], 0, 0x1404"),
        ("bytes >> 4 & 0x07f007f0u", "bytes >> 4 & 0x078007f0u"),  # a bit of the fraction of every other one
        ("(bytes & 0x80008000u) | ", ""),
        ("0x7b807b80u", "0x7b007b80u"),
        ("return launch_f32<E4m3Bits, 1>(a, stream);", "return launch_f32<int8_t, 1>(a, stream);"),
    ],
    "norm_row_linear": [
        ("__syncthreads();\n    return row", "return row"),
        ("squares = sum_over_lanes(squares);", ""),
        ("k += kNormThreads * kPack", "k += 2 * kNormThreads * kPack"),
        ("part / kNormWarps, warp", "0, warp"),  # every row by the first one's size
        ("(norm_weight, 0, k)", "(norm_weight, 0, 0)"),
        ("gated ? a.out.width : kHalf", "kHalf"),  # the next gates in place of the ups
        ("silu(rounded<T>(value))", "rounded<T>(value)"),
    ],
    "row_linear_add": [
        ("to_float(*residual) + rounded<T>(value)", "rounded<T>(value)"),
        ("if (a.adds) {", "if (a.adds && row == 0) {"),
    ],
    "advance_windows": [
        ("context_lens[begin] <= 0", "context_lens[begin] < 0"),
        ("tokens_per_image <= max_pages * page_size", "tokens_per_image < max_pages * page_size"),
        ("context_lens[begin + drawn] > 0", "true"),  # rows that were not decoded draw too
        ("ids[kept + right - 1]", "ids[kept + right]"),  # the wrong guess is compared
        ("right < drawn &&", "right <= drawn &&"),
        ("ids[kept + row] = sampled_ids[begin + row];", "ids[kept + row] = read(sampled_ids[begin + row]);"),
        ("next - 1 + size < tokens_per_image", "next + size < tokens_per_image"),
        ("index >= grid_width", "index > grid_width"),
        ("sampled < 0 ? 0 : sampled", "sampled"),
        ("kWarp / 2; distance", "kWarp / 4; distance"),  # half of the warp's counts
        ("move(window, more >= 0)", "move(window, more > 0)"),
        ("__syncthreads();", ""),  # embeddings of ids that are not there yet
        ("id < a.embedding.count", "id + 1 < a.embedding.count"),
        ("id * a.embedding.stride", "id * a.embedding.width"),
        ("begin < packs;", "begin + kPack < packs;"),  # a lost tail
        ("begin += kThreads * kPacksAtOnce", "begin += kThreads * kPacksAtOnce * 2"),
        ("loose < a.cu_rows[a.windows]", "loose <= a.cu_rows[a.windows]"),
        ("first + i / width;\n", "first;\n"),  # every row over the first one
        ("a.out[first + i / width]", "a.out[first]"),
    ],
    "sample_tokens": [
        ("__syncthreads();\n    if (threadIdx.x == 0) shared.search", "if (threadIdx.x == 0) shared.search"),
        ("before + inside >= search.limit", "before + inside > search.limit"),
        ("if (lane >= distance) sum += below;", "sum += below;"),
        ("a.rank == 0 || b.score > a.score", "b.score > a.score"),
        ("logit == 0.0f ? 0.0f : logit", "logit"),
        ("chunk.count = range.high == 0 ? 0 : -1;", "chunk.count = 0;"),
        ("piece -= pieces;", ""),
        (
            "count_arrival(arrived, ticket) == ticket",
            "blockIdx.x == ticket",
        ),  # the last block, not the last to arrive
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
    checks: list[Callable[[], object]] = [partial(unseen_pages, op)] if op in PAGED else []
    checks += [partial(errors, op, case, exact) for case, exact in examples(op)]
    for check in checks:
        for descending in (False, True):
            kernels.set_descending(descending)
            try:
                if check():
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
    source, name, flags = whole_source_of(op), f"{op}_{index}", []
    if correct not in source:  # the op's own header, found before the right one
        header = Path("blip3o", "ops", f"{op}.h")
        planted = compiler.folder / name / header
        planted.parent.mkdir(parents=True)
        planted.write_text(plant((CSRC / "include" / header).read_text(), correct, fault))
        flags = ["-iquote", str(compiler.folder / name)]
    else:
        source = plant(source, correct, fault)
    kernels = compiler.build(op, source, name, flags)
    monkeypatch.setattr(native, "cuda", lambda: kernels)
    # What no block wrote is zero, not the right results of a call before or an index that ends the process.
    monkeypatch.setattr(Scratch, "memory", lambda _, count, dtype, device: torch.zeros(count, dtype=dtype))
    assert is_wrong(op, kernels)
