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
from blip3o_rt.graphs import Recorder
from blip3o_rt.measure.baselines.measure import relative_l2
from blip3o_rt.measure.bench import ablation, ceilings, lines, peers, run, stages, timing, work
from blip3o_rt.measure.bench.record import FILE, Record
from blip3o_rt.measure.bench.run import Run, Settings, model_entry
from blip3o_rt.measure.bench.subject import Subject, prepare
from blip3o_rt.measure.bench.table import as_text
from blip3o_rt.measure.bench.timing import Timing
from blip3o_rt.measure.bench.work import Work
from blip3o_rt.measure.random_checkpoint import folder_name, preset
from blip3o_rt.measure.reports.reading import set_apart
from blip3o_rt.measure.units import time_text
from blip3o_rt.measure.validate.checkpoint import EDITING
from tests.recorded_graph import RecordedGraphs

LINE_KEYS = """name what who batch samples cold median p90 min n per bytes flops ceiling share peak_memory
launches operator_calls note"""
OP_KEYS = (
    "op implementation dtype shape samples median p90 min n bytes flops ceiling share error bound ok note"
)
ABLATION_KEYS = "switch off on line samples_off samples_on ratio"
CEILINGS = [
    ceilings.Ceiling("read", None, "GB/s", 10.0, [9.0, 10.0]),
    ceilings.Ceiling("copy", None, "GB/s", 5.0, [5.0]),
    ceilings.Ceiling("matmul", "fp32", "GFLOP/s", 100.0, [100.0]),
]


def settings(*names: str, **changes: Any) -> Settings:
    usual: dict[str, Any] = {
        "tier": "exact",
        "batches": (1,),
        "stages": lines.select(names),
        "peers": (),
        "op_names": None,
        "ablate": frozenset(),
        "runs": 2,
        "seconds": 60.0,
        "quick": True,
        "steps": 2,
    }
    return Settings(**(usual | changes))


@pytest.fixture
def execute(subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Record]:
    """Runs with these settings; the ceilings are given, the record is in the test's folder."""
    monkeypatch.setattr(ceilings, "measure", lambda *_, **__: CEILINGS)
    monkeypatch.setattr(timing.gc, "collect", lambda: 0)  # a quarter of a second before every line

    def with_settings(chosen: Settings) -> Record:
        record = Record(tmp_path, ["blip3o-rt", "bench"], model_entry(subject, chosen.tier, []))
        Run(subject, chosen, record, lambda _: None).everything()
        return record

    return with_settings


def saved(folder: Path) -> dict[str, Any]:
    return json.loads((folder / FILE).read_text())


def by_name(data: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(line["name"], line["who"]): line for line in data["lines"]}


def test_record_of_all_stages(execute: Callable[..., Record], tmp_path: Path) -> None:
    everybody = ("transformers", "diffusers", "published")
    record = execute(settings("all", peers=everybody, runs=1, seconds=600.0))
    data = saved(tmp_path)
    assert data == record.data
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
        assert list(line) == LINE_KEYS.split()
        assert line["n"] == len(line["samples"]) >= 1
        assert line["launches"] is None  # there is no GPU here
        if line["bytes"] is not None:
            floor = max(line["bytes"] / 10e9, line["flops"] / 100e9)
            assert line["share"] == pytest.approx(floor / line["median"])
            assert line["ceiling"] in ("read", "matmul fp32")
    assert found["ar.token", "ours"]["n"] == lines.MORE_RUNS["ar.token"]
    for who in ("ours", "transformers"):
        assert found["ar.token", who]["operator_calls"] > 10
    assert found["image.host", "ours"]["median"] < found["image", "ours"]["median"]
    text = as_text(data)
    for name in lines.NAMES:
        assert name in text


def test_batches_are_of_tokens_and_pictures(execute: Callable[..., Record]) -> None:
    record = execute(settings("ar.token", "connector", "image", batches=(1, 3), runs=1))
    assert {(line["name"], line["batch"], line["per"]) for line in record.lines} == {
        ("ar.token", 1, 1),
        ("ar.token", 3, 3),
        ("connector", 1, 1),
        ("image", 1, 1),
        ("image", 3, 3),
        ("image.host", 1, 1),
        ("image.host", 3, 3),
    }


def test_a_picture_that_takes_too_long_is_composed_and_says_so(execute: Callable[..., Record]) -> None:
    record = execute(settings("ar", "connector", "dit", "vae.decode", "image", seconds=0.0))
    (image,) = (line for line in record.lines if line["name"] == "image")
    medians = {line["name"]: line["median"] for line in record.lines}
    counts = {"ar.prefill": 1, "ar.token": 64, "dit.tables": 1, "connector": 1, "dit.condition": 1}
    counts |= {"dit.step": 2, "vae.decode": 1}
    assert image["median"] == pytest.approx(sum(count * medians[name] for name, count in counts.items()))
    assert image["note"].startswith("composed: 1 x ar.prefill (ours) + 64 x ar.token (ours)")
    assert image["n"] == 1
    assert "image.host" not in medians


def test_time_that_is_too_short_for_a_picture_is_the_other_lines(
    execute: Callable[..., Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of a minute is not enough for pictures of forty seconds; alone they may take all of it."""
    monkeypatch.setattr(Run, "least_seconds", lambda *_: 40.0)
    taken: list[float] = []
    take = run.Budget.take
    monkeypatch.setattr(run.Budget, "take", lambda self, name: taken.append(take(self, name)) or taken[-1])
    execute(settings("connector", "image"))
    assert taken[0] == pytest.approx(60.0, rel=0.1)
    taken.clear()
    record = execute(settings("image"))
    assert {line["name"] for line in record.lines} == {"image", "image.host"}


def test_a_picture_that_can_neither_be_drawn_nor_composed_is_left_out(
    execute: Callable[..., Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Run, "least_seconds", lambda *_: 90.0)
    record = execute(settings("image"))
    assert record.lines == []
    assert (
        "image left out: drawing takes at least 90.0 s and the budget is 60.0 s" in record.data["notes"][-1]
    )


def test_the_least_a_picture_takes(subject: Subject, tmp_path: Path) -> None:
    """At the ceilings, if everybody did no more than ours."""
    record = Record(tmp_path, [], model_entry(subject, "exact", []))
    alone, beside = (Run(subject, settings("image", peers=p), record, print) for p in ((), ("published",)))
    assert alone.least_seconds(1) is None
    record.add_ceilings(CEILINGS)
    least = alone.least_seconds(1)
    assert least is not None
    config = subject.config()
    step = work.dit_step(config, 4, shortened=True)
    assert least > 2 * max(step.bytes / 10e9, step.flops / 100e9)
    assert beside.least_seconds(1) == pytest.approx(2 * least)
    batch = alone.least_seconds(4)
    assert batch is not None
    assert least < batch < 4 * least


def test_a_picture_that_fits_once_is_drawn_once(
    execute: Callable[..., Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Run, "estimate", lambda *_: 40.0)  # of 60 seconds
    record = execute(settings("image"))
    (image,) = (line for line in record.lines if line["name"] == "image")
    assert image["samples"] == [image["cold"]]
    assert image["note"] == "its only run is its first"


def test_a_line_that_fails_says_why_and_the_others_go_on(
    execute: Callable[..., Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("the first line\nthe second")

    monkeypatch.setattr(stages.VaeStage, "decode", fail)
    record = execute(settings("vae"))
    found = by_name(record.data)
    assert found["vae.decode", "ours"]["note"] == "failed: RuntimeError: the first line"
    assert (found["vae.decode", "ours"]["n"], found["vae.decode", "ours"]["median"]) == (0, None)
    assert found["vae.encode", "ours"]["n"] == 2
    assert record.failed
    assert record.data["complete"]
    assert "failed: RuntimeError" in as_text(record.data)


def test_a_peer_that_fails_is_noted_and_fails_nothing(
    execute: Callable[..., Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("it cannot run here")

    monkeypatch.setattr(peers.ConnectorPeer, "run", fail)
    record = execute(settings("connector", peers=("published",)))
    found = by_name(record.data)
    assert "failed: RuntimeError: it cannot run here" in found["connector", "published"]["note"]
    assert found["connector", "ours"]["n"] == 2
    assert not record.failed


def test_an_interruption_keeps_what_was_measured(
    execute: Callable[..., Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    execute: Callable[..., Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(*_: object) -> None:
        raise CheckpointError("this checkpoint has none")

    group = lines.Group(("tatok.encode",), ("ta_tok",), nothing)  # type: ignore[arg-type]
    monkeypatch.setattr(run, "GROUPS", (group, lines.GROUPS[1]))
    record = execute(settings("tatok", "connector"))
    assert [line["name"] for line in record.lines] == ["connector"]
    assert record.data["notes"] == [
        "quick: the ceilings are too small to mean anything",
        "tatok.encode left out: this checkpoint has none",
    ]
    assert not record.failed


def test_ops_are_recorded(execute: Callable[..., Record]) -> None:
    record = execute(settings(op_names=("gated_add", "nearest_code")))
    entries = record.data["ops"]
    assert {entry["op"] for entry in entries} == {"gated_add", "nearest_code"}
    assert {entry["dtype"] for entry in entries if entry["op"] == "gated_add"} == {"fp32", "bf16"}
    for entry in entries:
        assert set(entry) == set(OP_KEYS.split())
        assert entry["ok"]
    gated = next(entry for entry in entries if entry["op"] == "gated_add")
    assert gated["ceiling"] == "copy" or gated["dtype"] == "bf16"  # no matmul ceiling of bf16 was given
    assert record.lines == []
    assert "gated_add" in as_text(record.data)


def test_switches_are_recorded_and_leave_no_trace(
    execute: Callable[..., Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablation, "MORE_RUNS", {})
    record = execute(settings(ablate=ablation.select(["all"]), runs=1))
    entries = record.data["ablations"]
    assert {entry["line"] for entry in entries} == {*ablation.LINES} - {"dit.denoise"}
    assert {"image rows of the head", "key/value pages", "batching"} <= {entry["switch"] for entry in entries}
    for line in ("dit.step", "dit.step.edit"):
        assert "null tokens" in {entry["switch"] for entry in entries if entry["line"] == line}
    assert "ar_weights=int8" in {entry["switch"] for entry in entries if entry["line"] == "ar.prefill"}
    for entry in entries:
        assert set(entry) == set(ABLATION_KEYS.split())
        assert entry["ratio"] == pytest.approx(entry["samples_off"][0] / entry["samples_on"][0])
    assert not record.failed
    assert all(switch in as_text(record.data) for switch in ("batching", "key/value pages"))


def test_a_switch_is_listed_for_the_device_that_takes_it() -> None:
    cpu, gpu = ({s.name for s in ablation.listed("ar.token", torch.device(d))} for d in ("cpu", "cuda"))
    assert "batching" in gpu
    assert gpu - cpu == {"graphs"}
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


def test_a_record_says_its_switches_and_whether_there_were_graphs(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = replace(subject, switches={"step_cache": "3"})
    assert set_apart(model_entry(subject, "exact", [])) == {}
    assert set_apart(model_entry(given, "fast", [])) == {"step_cache": "3"}
    monkeypatch.setenv("BLIP3O_GRAPHS", "off")
    assert set_apart(model_entry(given, "fast", [])) == {"step_cache": "3", "graphs": "off"}


def test_a_step_of_8_bit_products_has_no_share_of_another_ceiling(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = replace(subject, switches={"dit_weights": "int8"})
    record = Record(tmp_path, [], model_entry(given, "fast", []))
    chosen = settings("dit.step", peers=("diffusers",), runs=1, tier="fast")
    monkeypatch.setattr(ceilings, "measure", lambda *_, **__: CEILINGS)
    Run(given, chosen, record, lambda _: None).everything()
    found = by_name(record.data)
    assert found["dit.step", "ours"]["n"] == 1
    assert found["dit.step", "ours"]["share"] is None
    assert found["dit.step", "diffusers"]["share"] is not None


def test_switches_that_are_given_are_measured(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of all steps on a line of their own, beside the rest of what was given; tiles in the decoder."""
    monkeypatch.setattr(ceilings, "measure", lambda *_, **__: CEILINGS)
    given = replace(subject, switches={"step_cache": "3", "vae_tiles": "2"})
    record = Record(tmp_path, [], model_entry(given, "fast", []))
    chosen = settings(ablate=ablation.select(["dit.denoise"]), runs=2, tier="fast")
    Run(given, chosen, record, lambda _: None).everything()
    (entry,) = record.data["ablations"]
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
def recorded(monkeypatch: pytest.MonkeyPatch) -> RecordedGraphs:
    """Stages record as on a GPU."""
    graphs = RecordedGraphs()
    monkeypatch.setattr(Recorder, "of", lambda _: Recorder(graphs))
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
        ablation.dit_step(checkpoint, edit=edit),
        ablation.dit_step(checkpoint, edit=edit, null_written_out=True),
    )
    results = []
    with torch.no_grad():
        for contender in (whole, without):
            contender.prepare()
            results.append(contender.call())
    assert relative_l2(results[1], results[0]) < 1e-5


def test_what_a_request_replays_is_replayed(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """All steps of each kind, the condition and the connector, to the numbers that they have without."""
    given = replace(subject, switches={"step_cache": "2", "guidance_interval": "0:0.9"})
    checkpoint, graphs, found = given.load(("connector", "dit")), RecordedGraphs(), []
    for recorder in (Recorder(None), Recorder(graphs)):
        monkeypatch.setattr(Recorder, "of", lambda _, recorder=recorder: recorder)
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
    execute: Callable[..., Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("no such piece")

    monkeypatch.setattr(ablation, "MORE_RUNS", {})
    monkeypatch.setattr(ablation, "written_out", fail)
    record = execute(settings(ablate=ablation.select(["dit.step.edit"]), runs=1))
    found = {entry["switch"] for entry in record.data["ablations"]}
    assert "null tokens" not in found
    assert record.failed
    assert "switch null tokens of dit.step.edit failed: RuntimeError: no such piece" in record.data["notes"]


def test_a_switch_that_this_machine_cannot_take_is_left_out(
    execute: Callable[..., Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = Subject.load

    def exact_alone(self: Subject, *parts: Any) -> Checkpoint:
        if self.switches:
            raise ParameterError("it has no kernel here")
        return load(self, *parts)

    monkeypatch.setattr(Subject, "load", exact_alone)
    record = execute(settings(ablate=ablation.select(["ar.prefill"]), runs=1))
    assert record.data["ablations"] == []
    assert "switch ar_weights=int8 of ar.prefill left out: it has no kernel here" in record.data["notes"]
    assert not record.failed


def test_one_switch_table_alone(execute: Callable[..., Record], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablation, "MORE_RUNS", {})
    record = execute(settings(ablate=ablation.select(["ar.prefill"]), runs=1))
    assert {entry["line"] for entry in record.data["ablations"]} == {"ar.prefill"}
    assert record.lines == []
    assert ablation.select(["dit"]) == {"dit.step", "dit.step.edit", "dit.denoise"}
    with pytest.raises(ParameterError, match="ablate has 'connector': accepted are all, ar, tatok, dit, vae"):
        ablation.select(["connector"])


@pytest.mark.usefixtures("either_way")
def test_an_ops_switch_runs_its_reference(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = subject.load(stages.ArStage.parts)
    switches = {s.name: s for s in ablation.op_switches("ar.token", ablation.ar_token(checkpoint))}
    if "rms_norm" not in switches:
        pytest.skip("no op has a native implementation here")
    contender = ablation._under(switches["rms_norm"].off, "ar.token", subject, checkpoint)
    from blip3o_rt import ops

    with ablation._restored([switches["rms_norm"].off]):
        contender.prepare()
        with ops.recording_usage() as used:
            contender.call()
    assert used["rms_norm"] == {"torch"}
    assert used["row_linear"] == {"cpu"}
    with ops.recording_usage() as used:
        ops.rms_norm(torch.ones(1, 4), torch.ones(4), 1e-6)
    assert used == {"rms_norm": {"cpu"}}
    assert set(switches[ablation.ALL_OPS].off.forced) >= {"rms_norm", "row_linear"}


# The record by itself


def test_a_record_is_never_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = Record(tmp_path, [], {"dtype": "fp32"})
    record.note("first")
    before = (tmp_path / FILE).read_text()

    def full(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="disk full"):
        record.note("second")
    assert (tmp_path / FILE).read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_shares_of_ceilings(tmp_path: Path) -> None:
    record = Record(tmp_path, [], {"dtype": "fp32"})
    assert record.share(Work(1, 1), "fp32", 1.0) == {"ceiling": None, "share": None}
    record.add_ceilings(CEILINGS)
    assert record.share(Work(10**9, 1), "fp32", 0.2) == {"ceiling": "read", "share": pytest.approx(0.5)}
    assert record.share(Work(10**9, 1), "fp32", 0.2, "copy") == {"ceiling": "copy", "share": 1.0}
    assert record.share(Work(1, 10**10), "fp32", 0.2) == {
        "ceiling": "matmul fp32",
        "share": pytest.approx(0.5),
    }
    assert record.share(None, "fp32", 0.2)["share"] is None
    assert record.share(Work(1, 1), "fp32", None)["share"] is None


def test_a_peer_is_compared_with_ours(tmp_path: Path) -> None:
    record = Record(tmp_path, [], {"dtype": "fp32"})
    for who, seconds in (("ours", 0.1), ("transformers", 0.22)):
        record.add_line("ar.token", "a token", who, Timing(samples=[seconds] * 3), batch=1, per=1)
    row = next(line for line in as_text(record.data).splitlines() if "transformers" in line)
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


def test_a_random_checkpoint_is_written_once(tmp_path: Path) -> None:
    said: list[str] = []
    cpu = torch.device("cpu")
    first = prepare("tiny", torch.bfloat16, cpu, tmp_path, said.append)
    assert first.folder == tmp_path / f"{folder_name(preset('tiny', EDITING))}-bf16"
    count = len(said)
    assert count > 0
    assert prepare("tiny", torch.bfloat16, cpu, tmp_path, said.append) == first
    assert len(said) == count
    assert first.load(["dit"]).weights.keys() == {"dit"}
    with pytest.raises(
        CheckpointError, match="accepted are published, shapes, tiny or a checkpoint's folder"
    ):
        prepare(str(tmp_path / "none"), torch.bfloat16, cpu, tmp_path, said.append)


def test_both_dtypes_are_the_same_model(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    wide, narrow = (
        prepare("tiny", dtype, cpu, tmp_path, lambda _: None).load(["dit"]).weights["dit"]
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert all(torch.equal(wide[name], narrow[name].float()) for name in wide)


def test_ceilings_of_this_machine() -> None:
    found = ceilings.measure(torch.device("cpu"), quick=True)
    assert [ceiling.key for ceiling in found] == ["read", "copy", "matmul fp32", "matmul bf16"]
    for ceiling in found:
        assert ceiling.value == max(ceiling.samples) > 0
        assert len(ceiling.samples) == ceilings.RUNS
