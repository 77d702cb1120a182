"""What the CUDA kernel of each op reads and writes, before and behind its wait for the kernel before it.

Up to its wait a kernel of a dependent launch runs beside the kernel before it (csrc/cuda/dependent_launch.h),
which has waited for its own. So all is well where no kernel writes what is in `before`, and none writes
anything before its wait. Both are tested, and that this table is true.
"""

from __future__ import annotations

from dataclasses import dataclass

WEIGHTS = {"weight"}
"""Arguments that a kernel may read before its wait, unless a call writes them in the same chain."""


@dataclass(frozen=True)
class Accesses:
    """Arguments that a kernel reads before its wait, and those that it reads and writes behind it."""

    before: frozenset[str]
    reads: frozenset[str]
    writes: frozenset[str]

    @property
    def all(self) -> frozenset[str]:
        return self.before | self.reads | self.writes


def accesses(*, before: str = "", reads: str, writes: str) -> Accesses:
    return Accesses(*(frozenset(names.split()) for names in (before, reads, writes)))


HAZARDS = {
    "advance_windows": accesses(
        reads="sampled_ids cu_rows first_ids page_table num_generated context_lens output_slots output_ids "
        "embedding",
        writes="num_generated context_lens output_slots output_ids positions slot_mapping embedded out",
    ),
    "decode_attention": accesses(
        reads="qkv q_weight k_weight cos_sin_cache positions slot_mapping k_cache v_cache page_table "
        "context_lens scratch",
        writes="k_cache v_cache scratch out",
    ),
    "norm_row_linear": accesses(before="weight", reads="x norm_weight scale", writes="out"),
    "paged_decode_attention": accesses(
        reads="q k_cache v_cache page_table context_lens scratch", writes="scratch out"
    ),
    "paged_prefill_attention": accesses(
        reads="q k_cache v_cache page_table cu_seqlens_q context_lens", writes="out"
    ),
    "qk_norm_rope_append": accesses(
        reads="qkv q_weight k_weight cos_sin_cache positions slot_mapping", writes="k_cache v_cache out"
    ),
    "rms_norm": accesses(reads="x weight bias residual", writes="residual out"),
    "rms_norm_keep": accesses(reads="x weight slots", writes="kept out"),
    "row_linear": accesses(before="weight", reads="x bias", writes="out"),
    "row_linear_add": accesses(before="weight", reads="x scale residual", writes="residual"),
    "row_linear_w8": accesses(before="weight", reads="x scale bias", writes="out"),
    "sample_tokens": accesses(
        reads="logits temperature top_k top_p seeds positions scratch", writes="scratch out"
    ),
    "silu_mul": accesses(reads="gate_up", writes="out"),
}
