"""A whole run on the tiny model: what the record holds, and what is left of it when something goes wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from blip3o_rt.checkpoint.load import Checkpoint
from blip3o_rt.errors import CheckpointError, ParameterError
from blip3o_rt.graphs import GraphRunner
from blip3o_rt.measure.baselines.measure import relative_l2
from blip3o_rt.measure.bench import ablation, baselines, lines, rooflines, run, stages, timing
from blip3o_rt.measure.bench.command import FILE
from blip3o_rt.measure.bench.lines import Settings
from blip3o_rt.measure.bench.run import Run, model_entry
from blip3o_rt.measure.bench.subject import Subject, prepare
from blip3o_rt.measure.random_checkpoint import folder_name, preset
from blip3o_rt.measure.records import BenchRecord, Line, OpTime, Roofline
from blip3o_rt.measure.tables import as_text
from blip3o_rt.measure.units import time_text
from blip3o_rt.measure.validate.checkpoint import EDITING
from tests.captured_graph import CapturedGraphs

LINE_KEYS = """samples median p90 min n name what who batch per cold host bytes flops ceiling share
peak_memory launches operator_calls note"""
OP_KEYS = (
    "op implementation dtype shape samples median p90 min n bytes flops ceiling share error bound ok note"
)
ABLATION_KEYS = "switch off on line samples_off samples_on ratio"
ROOFLINES = [
    Roofline(name="read", unit="GB/s", value=10.0, samples=(9.0, 10.0)),
    Roofline(name="copy", unit="GB/s", value=5.0, samples=(5.0,)),
    Roofline(name="matmul", dtype="fp32", unit="GFLOP/s", value=100.0, samples=(100.0,)),
]


def settings(*names: str, **changes: Any) -> Settings:
    usual: dict[str, Any] = {
        "tier": "exact",
        "batches": (1,),
        "lines": lines.select(names),
        "baselines": (),
        "op_names": None,
        "ablate": frozenset(),
        "runs": 2,
        "quick": True,
        "steps": 2,
    }
    return Settings(**(usual | changes))


@pytest.fixture
def execute(subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., BenchRecord]:
    """Runs with these settings; the rooflines are given, the record is in the test's folder."""
    monkeypatch.setattr(rooflines, "measure", lambda *_, **__: ROOFLINES)
    monkeypatch.setattr(timing.gc, "collect", lambda: 0)  # a quarter of a second before every line

    def with_settings(chosen: Settings) -> BenchRecord:
        record = BenchRecord.begin(
            tmp_path / FILE, ["blip3o-rt", "bench"], model_entry(subject, chosen.tier, [])
        )
        Run(subject, chosen, record, lambda _: None).everything()
        return record

    return with_settings


def saved(folder: Path) -> dict[str, Any]:
    return json.loads((folder / FILE).read_text())


def by_name(data: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(line["name"], line["who"]): line for line in data["lines"]}


def test_record_of_all_stages(execute: Callable[..., BenchRecord], tmp_path: Path) -> None:
    everybody = ("transformers", "diffusers", "published")
    record = execute(settings("all", baselines=everybody, runs=1))
    data = saved(tmp_path)
    assert data == json.loads(json.dumps(record.to_json()))
    assert (data["kind"], data["version"], data["complete"]) == ("bench", 1, True)
    assert {"size", "dtype", "tier", "device", "threads", "switches"} <= set(data["model"])
    assert data["model"]["size"] == "tiny"
    assert data["model"]["switches"]["ops"]["rms_norm"] in ("cpu", "torch")
    assert {(c["name"], c["dtype"], c["unit"]) for c in data["ceilings"]} == {
        ("read", None, "GB/s"),
        ("copy", None, "GB/s"),
        ("matmul", "fp32", "GFLOP/s"),
    }
    assert not record.failed
    found = by_name(data)
    assert {name for name, who in found if who == "ours"} == set(lines.NAMES) - {"ar.second_pass"}
    assert {who for name, who in found if name == "image"} == {"ours", "published"}
    for line in data["lines"]:
        assert sorted(line) == sorted(LINE_KEYS.split())
        assert line["n"] == len(line["samples"]) >= 1
        assert line["launches"] is None  # there is no GPU here
        if line["bytes"] is not None:
            floor = max(line["bytes"] / 10e9, line["flops"] / 100e9)
            assert line["share"] == pytest.approx(floor / line["median"])
            assert line["ceiling"] in ("read", "matmul fp32")
    assert found["ar.token", "ours"]["n"] == run.MORE_RUNS["ar.token"]
    for who in ("ours", "transformers"):
        assert found["ar.token", who]["operator_calls"] > 10
    assert found["image.host", "ours"]["median"] < found["image", "ours"]["median"]
    text = as_text(record)
    for name in lines.NAMES:
        assert name in text


def test_batches_are_of_tokens_and_images(execute: Callable[..., BenchRecord]) -> None:
    record = execute(settings("ar.token", "connector", "image", batches=(1, 3), runs=1))
    assert {(line.name, line.batch, line.per) for line in record.lines} == {
        ("ar.token", 1, 1),
        ("ar.token", 3, 3),
        ("connector", 1, 1),
        ("image", 1, 1),
        ("image", 3, 3),
        ("image.host", 1, 1),
        ("image.host", 3, 3),
    }


def test_an_image_that_is_not_drawn_is_composed_and_says_so(execute: Callable[..., BenchRecord]) -> None:
    record = execute(settings("ar", "connector", "dit", "vae.decode"))
    (image,) = (line for line in record.lines if line.name == "image")
    medians = {line.name: line.median or 0.0 for line in record.lines}
    counts = {"ar.prefill": 1, "ar.token": 64, "dit.tables": 1, "connector": 1, "dit.condition": 1}
    counts |= {"dit.step": 2, "vae.decode": 1}
    assert image.median == pytest.approx(sum(count * medians[name] for name, count in counts.items()))
    assert (image.note or "").startswith("composed: 1 x ar.prefill (ours) + 64 x ar.token (ours)")
    assert (image.count, image.composed) == (1, True)
    assert "image.host" not in medians


def test_a_line_that_fails_says_why_and_the_others_go_on(
    execute: Callable[..., BenchRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("the first line\nthe second")

    monkeypatch.setattr(stages.VaeStage, "decode", fail)
    record = execute(settings("vae"))
    found = by_name(record.to_json())
    assert found["vae.decode", "ours"]["note"] == "failed: RuntimeError: the first line"
    assert (found["vae.decode", "ours"]["n"], found["vae.decode", "ours"]["median"]) == (0, None)
    assert found["vae.encode", "ours"]["n"] == 2
    assert record.failed
    assert record.complete
    assert "failed: RuntimeError" in as_text(record)


def test_a_baseline_that_fails_is_noted_and_fails_nothing(
    execute: Callable[..., BenchRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("it cannot run here")

    monkeypatch.setattr(baselines.ConnectorBaseline, "run", fail)
    record = execute(settings("connector", baselines=("published",)))
    found = by_name(record.to_json())
    assert "failed: RuntimeError: it cannot run here" in found["connector", "published"]["note"]
    assert found["connector", "ours"]["n"] == 2
    assert not record.failed


def test_an_interruption_keeps_what_was_measured(
    execute: Callable[..., BenchRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(100))

    def interrupted(_: object) -> None:
        if next(calls) == 2:  # cold, warm, and then
            raise KeyboardInterrupt

    monkeypatch.setattr(stages.VaeStage, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        execute(settings("vae", runs=5))
    data = saved(tmp_path)
    assert not data["complete"]
    assert by_name(data)["vae.decode", "ours"]["n"] == 5
    assert by_name(data)["vae.encode", "ours"]["n"] == 1


def test_a_part_that_the_checkpoint_lacks_is_left_out_with_a_note(
    execute: Callable[..., BenchRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = Subject.load

    def without_tower(self: Subject, parts: Any = None) -> Checkpoint:
        if parts == ["ta_tok"]:
            raise CheckpointError("this checkpoint has none")
        return load(self, parts)

    monkeypatch.setattr(Subject, "load", without_tower)
    record = execute(settings("tatok", "connector"))
    assert [line.name for line in record.lines] == ["connector"]
    assert record.notes == [
        "quick: the rooflines are too small to mean anything",
        "tatok.encode left out: this checkpoint has none",
    ]
    assert not record.failed


def test_ops_are_recorded(execute: Callable[..., BenchRecord]) -> None:
    record = execute(settings(op_names=("gated_add", "nearest_code")))
    entries = [op.to_json() for op in record.ops]
    assert {entry["op"] for entry in entries} == {"gated_add", "nearest_code"}
    assert {entry["dtype"] for entry in entries if entry["op"] == "gated_add"} == {"fp32", "bf16"}
    for entry in entries:
        assert set(entry) == set(OP_KEYS.split())
        assert entry["ok"]
    gated = next(entry for entry in entries if entry["op"] == "gated_add")
    assert gated["ceiling"] == "copy" or gated["dtype"] == "bf16"  # no matmul ceiling of bf16 was given
    assert record.lines == []
    assert "gated_add" in as_text(record)


def test_switches_are_recorded_and_leave_no_trace(
    execute: Callable[..., BenchRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = execute(settings(ablate=lines.select(["all"], lines.ABLATED), runs=1))
    entries = [entry.to_json() for entry in record.ablations]
    assert {entry["line"] for entry in entries} == {*lines.ABLATED} - {"dit.denoise"}
    assert {"image rows of the head", "key/value pages", "batching"} <= {entry["switch"] for entry in entries}
    for line in ("dit.step", "dit.step.edit"):
        assert "unconditional tokens" in {entry["switch"] for entry in entries if entry["line"] == line}
    assert "ar_weights=int8" in {entry["switch"] for entry in entries if entry["line"] == "ar.prefill"}
    for entry in entries:
        assert set(entry) == set(ABLATION_KEYS.split())
        assert entry["ratio"] == pytest.approx(entry["samples_off"][0] / entry["samples_on"][0])
    assert not record.failed
    assert all(switch in as_text(record) for switch in ("batching", "key/value pages"))


def test_a_switch_is_listed_for_the_device_that_takes_it() -> None:
    cpu, gpu = ({s.name for s in ablation.listed("ar.token", torch.device(d))} for d in ("cpu", "cuda"))
    assert "batching" in gpu
    assert gpu - cpu == {"graphs", "dependent launches"}
    assert cpu - gpu == {"AVX-512 kernels"} & cpu


def fast(line: str, subject: Subject) -> set[str]:
    return {switch.name for switch in ablation.fast_switches(line, subject)}


def test_switches_of_the_fast_tier_are_those_of_weights_and_those_given(subject: Subject) -> None:
    assert "ar_weights=int8" in fast("ar.token", subject)
    assert not fast("ar.token", subject) & fast("dit.step.edit", subject)
    assert fast("vae.decode", subject) == fast("dit.denoise", subject) == set()
    elsewhere = replace(subject, device=torch.device("meta"))  # where no setting has a kernel
    assert "ar_weights=int8" not in fast("ar.token", elsewhere)
    given = replace(subject, switches={"vae_tiles": "2", "step_cache": "3", "guidance_interval": "0:0.9"})
    assert fast("vae.decode", given) == {"vae_tiles=2"}
    assert fast("dit.denoise", given) == {"step_cache=3", "guidance_interval=0:0.9"}


def switches_of(subject: Subject, tier: str) -> dict[str, str]:
    return BenchRecord(model=model_entry(subject, tier, [])).switches


def test_a_record_says_its_switches_and_whether_there_were_graphs(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = replace(subject, switches={"step_cache": "3"})
    assert switches_of(subject, "exact") == {}
    assert switches_of(given, "fast") == {"step_cache": "3"}
    monkeypatch.setenv("BLIP3O_GRAPHS", "off")
    assert switches_of(given, "fast") == {"step_cache": "3", "graphs": "off"}
    monkeypatch.setenv("BLIP3O_DEPENDENT_LAUNCHES", "on")
    assert switches_of(subject, "exact") == {"graphs": "off", "dependent launches": "on"}


def test_a_step_of_8_bit_products_has_no_utilization_of_another_roofline(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = replace(subject, switches={"dit_weights": "int8"})
    record = BenchRecord.begin(tmp_path / FILE, [], model_entry(given, "fast", []))
    chosen = settings("dit.step", baselines=("diffusers",), runs=1, tier="fast")
    monkeypatch.setattr(rooflines, "measure", lambda *_, **__: ROOFLINES)
    Run(given, chosen, record, lambda _: None).everything()
    found = by_name(record.to_json())
    assert found["dit.step", "ours"]["n"] == 1
    assert found["dit.step", "ours"]["share"] is None
    assert found["dit.step", "diffusers"]["share"] is not None


def test_switches_that_are_given_are_measured(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of all steps on a line of their own, beside the rest of what was given; tiles in the decoder."""
    monkeypatch.setattr(rooflines, "measure", lambda *_, **__: ROOFLINES)
    given = replace(subject, switches={"step_cache": "3", "vae_tiles": "2"})
    record = BenchRecord.begin(tmp_path / FILE, [], model_entry(given, "fast", []))
    chosen = settings(ablate=frozenset(["dit.denoise"]), runs=2, tier="fast")
    Run(given, chosen, record, lambda _: None).everything()
    (entry,) = [entry.to_json() for entry in record.ablations]
    assert (entry["switch"], entry["line"]) == ("step_cache=3", "dit.denoise")
    assert stages.DitStage(given.load(["dit"])).kinds != stages.DitStage(subject.load(["dit"])).kinds
    decoders = [stages.VaeStage(s.load(["vae"])).autoencoder for s in (subject, given)]
    assert len({len(decoder._decoder) for decoder in decoders}) == 2  # the tiled end is one block


def test_a_fast_tiers_switch_is_off_on_the_one_side_and_on_on_the_other(subject: Subject) -> None:
    (switch,) = (s for s in ablation.fast_switches("ar.prefill", subject) if s.name == "ar_weights=int8")
    both = replace(subject, switches={"ar_weights": "int8"})
    for own in (subject, both):
        assert switch.off.of(own).switches == {}
        assert switch.on.of(own).switches == {"ar_weights": "int8"}


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> CapturedGraphs:
    """Stages record as on a GPU."""
    graphs = CapturedGraphs()
    monkeypatch.setattr(GraphRunner, "of", lambda _: GraphRunner(graphs))
    return graphs


@pytest.fixture(params=["cpu", "recorded"])
def either_way(request: pytest.FixtureRequest) -> None:
    """Stages as on a CPU, and recorded as on a GPU."""
    if request.param == "recorded":
        request.getfixturevalue("recorded")


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("edit", [False, True])
def test_a_step_with_every_unconditional_token_is_the_same_step(checkpoint: Checkpoint, edit: bool) -> None:
    whole, without = (
        lines.dit_step(checkpoint, edit=edit),
        lines.dit_step(checkpoint, edit=edit, every_token=True),
    )
    results = []
    with torch.no_grad():
        for candidate in (whole, without):
            candidate.prepare()
            results.append(candidate.call())
    assert relative_l2(results[1], results[0]) < 1e-5


def test_what_a_request_replays_is_replayed(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """All steps of each kind, the condition and the connector, to the numbers that they have without."""
    given = replace(subject, switches={"step_cache": "2", "guidance_interval": "0:0.9"})
    checkpoint, graphs, found = given.load(("connector", "dit")), CapturedGraphs(), []
    for runner in (GraphRunner(None), GraphRunner(graphs)):
        monkeypatch.setattr(GraphRunner, "of", lambda _, runner=runner: runner)
        dit, connector = stages.DitStage(checkpoint, steps=4), stages.ConnectorStage(checkpoint)
        with torch.no_grad():
            dit.prepare_denoise()
            before = graphs.replayed
            latent = dit.denoise()
            keys, tokens = dit.condition().keys.clone(), connector.run().conditional.clone()
            found.append((latent, keys, tokens))
    assert graphs.replayed - before == 4 + 1 + 1
    for eager, replayed in zip(*found, strict=True):
        assert relative_l2(replayed, eager) < 1e-6


def test_a_switch_that_cannot_be_built_fails_alone(
    execute: Callable[..., BenchRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("no such piece")

    monkeypatch.setattr(stages.DitStage, "every_token", fail)
    record = execute(settings(ablate=frozenset(["dit.step.edit"]), runs=1))
    found = {entry["switch"] for entry in [entry.to_json() for entry in record.ablations]}
    assert "unconditional tokens" not in found
    assert record.failed
    assert "switch unconditional tokens of dit.step.edit failed: RuntimeError: no such piece" in record.notes


def test_a_switch_that_this_machine_cannot_take_is_left_out(
    execute: Callable[..., BenchRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = Subject.load

    def exact_alone(self: Subject, *parts: Any) -> Checkpoint:
        if self.switches:
            raise ParameterError("it has no kernel here")
        return load(self, *parts)

    monkeypatch.setattr(Subject, "load", exact_alone)
    record = execute(settings(ablate=frozenset(["ar.prefill"]), runs=1))
    assert record.ablations == []
    assert "switch ar_weights=int8 of ar.prefill left out: it has no kernel here" in record.notes
    assert not record.failed


def test_one_switch_table_alone(execute: Callable[..., BenchRecord], monkeypatch: pytest.MonkeyPatch) -> None:
    record = execute(settings(ablate=frozenset(["ar.prefill"]), runs=1))
    assert {entry["line"] for entry in [entry.to_json() for entry in record.ablations]} == {"ar.prefill"}
    assert record.lines == []
    assert lines.select(["dit"], lines.ABLATED) == {"dit.step", "dit.step.edit", "dit.denoise"}
    with pytest.raises(ParameterError, match="ablate has 'connector': accepted are all, tatok, ar, dit, vae"):
        lines.select(["connector"], lines.ABLATED, "ablate")


@pytest.mark.usefixtures("either_way")
def test_an_ops_switch_runs_its_reference(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = subject.load(["ar"])
    switches = {s.name: s for s in ablation.op_switches("ar.token", checkpoint)}
    if "rms_norm" not in switches:
        pytest.skip("no op has a native implementation here")
    candidate = ablation._under(switches["rms_norm"].off, "ar.token", subject, checkpoint)
    from blip3o_rt import ops

    with ablation._restored([switches["rms_norm"].off]):
        candidate.prepare()
        with ops.recording_usage() as used:
            candidate.call()
    assert used["rms_norm"] == {"torch"}
    assert used["row_linear"] == {"cpu"}
    with ops.recording_usage() as used:
        ops.rms_norm(torch.ones(1, 4), torch.ones(4), 1e-6)
    assert used == {"rms_norm": {"cpu"}}
    assert set(switches[ablation.ALL_OPS].off.forced) >= {"rms_norm", "row_linear"}


# The record by itself


def test_a_record_is_never_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = BenchRecord.begin(tmp_path / FILE, [], {"dtype": "fp32"})
    record.note("first")
    before = (tmp_path / FILE).read_text()

    def full(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="disk full"):
        record.note("second")
    assert (tmp_path / FILE).read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    record = BenchRecord.begin(tmp_path / FILE, ["bench"], {"dtype": "fp32"})
    record.rooflines = ROOFLINES
    record.add(Line(name="ar.token", samples=(1.0, 2.0), note="a note"))
    record.add(OpTime(op="rms_norm", shape=[1, 2], samples=(1.0,), ok=True))
    record.finish()
    found = BenchRecord.load(tmp_path / FILE)
    assert found.to_json() == record.to_json()
    assert found.rooflines == ROOFLINES
    assert found.lines == record.lines


def test_what_bounds_some_work() -> None:
    record = BenchRecord()
    assert record.bound(1, 1, "fp32") is None
    record.rooflines = ROOFLINES
    assert record.bound(10**9, 1, "fp32") == ("read", pytest.approx(0.1))
    assert record.bound(10**9, 1, "fp32", "copy") == ("copy", pytest.approx(0.2))
    assert record.bound(1, 10**10, "fp32") == ("matmul fp32", pytest.approx(0.1))


@pytest.mark.parametrize(("bf16", "key"), [(20.0, "matmul fp32"), (400.0, "matmul bf16")])
def test_the_arithmetic_in_use_bounds_products_of_bfloat16(bf16: float, key: str) -> None:
    """Where a processor has no products of bfloat16, operands are widened and multiplied in float32."""
    products = Roofline(name="matmul", dtype="bf16", unit="GFLOP/s", value=bf16)
    record = BenchRecord(rooflines=[*ROOFLINES, products])
    assert record.bound(1, 10**10, "bf16") == (key, pytest.approx(10 / max(bf16, 100.0)))


def test_a_baseline_is_compared_with_ours(tmp_path: Path) -> None:
    record = BenchRecord(model={"dtype": "fp32"})
    for who, seconds in (("ours", 0.1), ("transformers", 0.22)):
        record.add(Line(name="ar.token", what="a token", who=who, samples=(seconds,) * 3))
    row = next(line for line in as_text(record).splitlines() if "transformers" in line)
    assert row.split()[-1] == "2.20x"
    assert "4.55 tokens/s" in row


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, ""),
        (1234.5, "1,234 s"),
        (12.345, "12.3 s"),
        (1.0, "1.00 s"),
        (0.99996, "1.00 s"),
        (0.0123, "12.3 ms"),
        (0.00099999, "1.00 ms"),
        (12.3e-6, "12.3 µs"),
        (4.5e-7, "450 ns"),
    ],
)
def test_seconds_in_words(seconds: float | None, text: str) -> None:
    assert time_text(seconds) == text


# The subject


def test_a_random_model_keeps_nothing_but_its_tokenizer(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    first = prepare("tiny", torch.bfloat16, cpu, tmp_path)
    assert first.folder == tmp_path / f"{folder_name(preset('tiny', EDITING))}-tokenizer"
    assert {path.name for path in first.folder.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    assert prepare("tiny", torch.bfloat16, cpu, tmp_path) == first
    assert first.load(["dit"]).weights.keys() == {"dit"}
    with pytest.raises(
        CheckpointError, match="accepted are published, tiny, shapes or a checkpoint's folder"
    ):
        prepare(str(tmp_path / "none"), torch.bfloat16, cpu, tmp_path)


def test_random_weights_are_the_same_model_every_time(tmp_path: Path) -> None:
    """In both dtypes; each tensor has numbers of its own, scaled by its fan-in."""
    cpu = torch.device("cpu")
    wide, again, narrow = (
        prepare("tiny", dtype, cpu, tmp_path).load(["ar", "ta_tok"]).weights
        for dtype in (torch.float32, torch.float32, torch.bfloat16)
    )
    for part, tensors in wide.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, again[part][name])
            assert relative_l2(narrow[part][name].float(), tensor) < 2**-8
    one, other = (wide["ar"][f"layers.{layer}.mlp.down_proj.weight"] for layer in (0, 1))
    assert not torch.equal(one, other)
    assert one.std() == pytest.approx(one.shape[1] ** -0.5, rel=0.05)
    assert wide["ar"]["norm.weight"].mean() == pytest.approx(1.0, abs=0.1)


def test_rooflines_of_this_machine() -> None:
    found = rooflines.measure(torch.device("cpu"), quick=True)
    assert [roofline.key for roofline in found] == ["read", "copy", "matmul fp32", "matmul bf16"]
    for roofline in found:
        assert roofline.value == max(roofline.samples) > 0
        assert len(roofline.samples) == rooflines.RUNS
