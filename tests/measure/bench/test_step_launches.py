"""Launches, bytes and operations of a step and of decoding, against counts by hand on the tiny geometry.

L = 2 layers of D = 64 channels (cross 64), 64 image tokens (128 of an edit), 65 tokens of the condition (and
64 cells of an edit's reference), all in bfloat16.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from blip3o_rt import ops
from blip3o_rt.checkpoint.load import Checkpoint
from blip3o_rt.measure.bench import step_launches, unoptimised, work
from blip3o_rt.measure.bench.ablation import DECODER, EDIT, LINES, STEP
from blip3o_rt.measure.bench.compose import OURS
from blip3o_rt.measure.bench.counts import Count, total
from blip3o_rt.measure.bench.step_launches import DIFFUSERS, StepCount

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
L, D, N, M = 2, 64, 64, 65
BF16, FP32 = 2, 4


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return step_launches.meta_checkpoint("tiny", torch.bfloat16)


def counted(checkpoint: Checkpoint, line: str, who: str = OURS) -> StepCount:
    return step_launches.counted(step_launches.contender(checkpoint, line, who))


def saved(checkpoint: Checkpoint, line: str, **options: object) -> tuple[int, int]:
    """Launches and operations of what a line does beyond ours with an optimisation taken out."""
    without = step_launches.counted(LINES[line].build(checkpoint, **options))
    whole = counted(checkpoint, line)
    return without.launches - whole.launches, without.flops - whole.flops


@pytest.mark.parametrize(("line", "tokens", "halves"), [(STEP, N, 1), (EDIT, 2 * N, 2)])
def test_a_step_of_ours(checkpoint: Checkpoint, line: str, tokens: int, halves: int) -> None:
    found = counted(checkpoint, line)
    # Of a block: q|k|v, out, query, out, and the two 1x1 convolutions; and the first and last projection.
    assert found.products == 6 * L + 2
    calls = {name: count.calls for name, count in found.passes.items()}
    assert calls["layer_norm_modulate"] == 2 * L + 1
    assert calls["gated_add"] == 2 * L
    assert calls["cross_attention"] == halves * L  # of the one half, or of the null half's two keys too
    assert calls["relu_linear_attention"] == calls["depthwise_glu"] == L
    assert calls["guided_euler_step"] == calls["repeat"] == 1
    assert found.passes["relu_linear_attention"].launches == 3 * L
    assert found.passes["cross_attention"].launches == 2 * halves * L  # the RMS of the queries is one
    if halves == 1:  # queries twice, once for their RMS, and their weight; keys and values; the result
        assert found.passes["cross_attention"].bytes == L * (3 * tokens + 1 + 2 * M) * D * BF16
    # The first one is of one half; the last one writes float32.
    rows, vectors = tokens * D, 2 * D * FP32
    moved = 2 * rows * BF16 + (2 * L - 1) * 4 * rows * BF16 + 2 * rows * (BF16 + FP32)
    assert found.passes["layer_norm_modulate"].bytes == moved + (2 * L + 1) * vectors
    assert found.passes["repeat"].bytes == 3 * rows * BF16


@pytest.mark.parametrize("line", [STEP, EDIT])
def test_a_step_of_diffusers(checkpoint: Checkpoint, line: str) -> None:
    found = counted(checkpoint, line, DIFFUSERS)
    # Of a block: eight projections, the linear attention's two products, one fused attention, three
    # convolutions; patch embedding, three layers of the time embedding, two of the captions, and the last.
    assert found.products == 14 * L + 7
    assert found.passes["native_layer_norm"].calls == 2 * L + 1
    assert found.passes["relu"].calls == 2 * L
    # Of the patch embedding and of each block's first 1x1 convolution, to 2 x 160 channels of both halves.
    biased = 2 * (2 * N if line == EDIT else N) * (D + L * 2 * 160)
    assert found.passes[step_launches.CONVOLUTION_BIAS] == Count(L + 1, L + 1, 2 * biased * BF16)
    assert found.passes["silu"].calls == 2 * L + 2  # and of the time embedding
    expected = work.dit_step(checkpoint.config, BF16, shortened=False, edit=line == EDIT).flops
    assert found.flops == pytest.approx(expected, rel=0.02)  # sums in linear attention are padded there


def test_decoding(checkpoint: Checkpoint) -> None:
    ours, theirs = (counted(checkpoint, DECODER, who) for who in (OURS, DIFFUSERS))
    for found, shortened in ((ours, True), (theirs, False)):
        expected = work.vae_decode(checkpoint.config, BF16, shortened=shortened).flops
        assert found.flops == pytest.approx(expected, rel=0.02)
    assert ours.launches < theirs.launches
    assert ours.all_passes.bytes < theirs.all_passes.bytes
    assert theirs.passes["upsample_nearest2d"].calls == 3  # one for each doubling
    assert "upsample_nearest2d" not in ours.passes


def test_what_an_optimisation_saves(checkpoint: Checkpoint) -> None:
    attention = 2 * N * (2 * D * D + 2 * M * D)  # of one half's tokens: query, output, and M keys
    assert saved(checkpoint, STEP, null_written_out=True)[1] == L * attention
    again = work.dit_condition(checkpoint.config.dit, BF16, tokens=M + 1).flops
    constant = 2 * L * D * D  # the null token's output
    assert saved(checkpoint, STEP, kind=unoptimised.condition_every_step)[1] == again + constant
    launches, flops = saved(checkpoint, STEP, kind=unoptimised.tables_every_step)
    assert flops == work.dit_tables(checkpoint.config.dit, BF16, steps=1).flops
    assert launches > 10
    launches, flops = saved(checkpoint, STEP, both_halves=True)
    assert launches == 0
    assert flops == pytest.approx(2 * N * 4 * D * D, rel=0.2)  # and of linear attention, by its definition
    launches, flops = saved(checkpoint, DECODER, doubled=True)
    assert launches >= 3  # the doubled pictures
    exact = (work.vae_decode(checkpoint.config, BF16, shortened=s).flops for s in (False, True))
    assert flops == next(exact) - next(exact)


def test_an_op_as_its_definition_is_counted_by_the_operators_it_calls(checkpoint: Checkpoint) -> None:
    whole = counted(checkpoint, STEP)
    apart = step_launches.counted(LINES[STEP].build(checkpoint), frozenset(["gated_add"]))
    assert "gated_add" not in apart.passes
    assert apart.launches > whole.launches
    assert apart.products == whole.products


def test_ops_compute_again_afterwards(checkpoint: Checkpoint) -> None:
    counted(checkpoint, STEP)
    x = torch.randn(2, 8)
    assert torch.allclose(ops.rms_norm(x, torch.ones(8), 0.0), x / x.square().mean(-1, keepdim=True).sqrt())


def test_the_command_prints_and_writes_what_it_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "counts.json"
    step_launches.main(["--size", "tiny", "--json", str(path)])
    data, printed = json.loads(path.read_text()), capsys.readouterr().out
    assert (data["kind"], data["size"], data["complete"]) == ("step_launches", "tiny", True)
    assert [(e["line"], e["who"]) for e in data["lines"]] == [
        (line, who) for line in (STEP, EDIT, DECODER) for who in (OURS, DIFFUSERS)
    ]
    assert {"null tokens", "condition", "modulation", "cross_attention", "all ops"} <= {
        entry["switch"] for entry in data["switches"] if entry["line"] == STEP
    }
    for entry in data["switches"]:
        if entry["switch"] in ops.all_ops():
            assert entry["launches"] > 0
        assert entry["switch"] in printed
    ours = data["lines"][0]
    moved = total(Count(**count) for count in ours["passes"].values()).bytes
    assert step_launches.megabytes(moved) in printed


@pytest.mark.parametrize("line", [STEP, EDIT, DECODER])
def test_the_committed_counts_are_those_of_the_code(line: str) -> None:
    """`python -m blip3o_rt.measure.bench.step_launches --json PATH` writes them.

    Those of our ops: torch's own operators may be others in another version.
    """
    record = json.loads((RESULTS / "step_launches.json").read_text())
    (kept,) = (entry for entry in record["lines"] if (entry["line"], entry["who"]) == (line, OURS))
    published = step_launches.meta_checkpoint(record["size"], torch.bfloat16)
    found = {name: asdict(count) for name, count in counted(published, line).passes.items()}
    assert {n: c for n, c in kept["passes"].items() if n in ops.all_ops()} == {
        n: c for n, c in found.items() if n in ops.all_ops()
    }


def test_without_diffusers_only_ours_is_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(step_launches, "missing_package", lambda _: "it is not installed")
    monkeypatch.setattr(step_launches, "_savings", lambda *_: ())
    step_launches.main(["--size", "tiny"])
    printed = capsys.readouterr()
    assert printed.err == "diffusers left out: it is not installed\n"
    assert "diffusers" not in printed.out
