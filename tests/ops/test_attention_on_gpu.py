"""On a GPU, the splits of attention are added up by the block that is last to arrive, launch after launch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from blip3o_rt import ops
from blip3o_rt.measure.cases import check_of
from blip3o_rt.measure.cases.attention import decode_case, paged_case
from blip3o_rt.measure.validate.case import Case, copies, run_exact
from blip3o_rt.ops.dtypes import FLOATS

pytestmark = pytest.mark.gpu("_cuda")

LENGTHS = [1, 64, 65, 130, 700, 16, 1000, 333, 128, 5]
LAUNCHES = 100


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    ("op_name", "case"), [("paged_decode_attention", paged_case), ("decode_attention", decode_case)]
)
def test_many_launches_with_one_scratch_memory(
    op_name: str, case: Callable[..., Case], head_dim: int, dtype: torch.dtype
) -> None:
    """Two batches in turn: a part that is read before it is written is the other batch's, and shows."""
    op = ops.all_ops()[op_name]
    one = replace(case("", dtype, LENGTHS, 16, 8, head_dim, 16), written=())
    queries, *others = one.arguments
    batches = [one, replace(one, arguments=(queries.roll(1, 0), *others))]
    on_device = [copies(batch, "cuda")[0] for batch in batches]
    run, scratch = op.named("cuda").run, ops.Scratch()
    results = [run(op.bind(*on_device[launch % 2], scratch=scratch)) for launch in range(LAUNCHES)]
    for batch, result in zip(batches, results[:2], strict=True):
        found = check_of(op_name)(op, batch, [result.cpu()], run_exact(op, batch))
        assert all(finding.passed for finding in found), found
    for launch, result in enumerate(results):
        assert torch.equal(result, results[launch % 2])
    assert not scratch.counters(1, results[0].device).any()
