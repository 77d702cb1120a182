"""A trace has a range for every stage, step and op of a request, inside one another as the work was."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from blip3o_rt import ops, trace
from blip3o_rt.cli import main
from blip3o_rt.config import EditConfig
from blip3o_rt.errors import DeviceError, ParameterError
from blip3o_rt.measure.random_checkpoint import preset, write_random_checkpoint
from blip3o_rt.pipeline import Pipeline

STEPS = 2
LAYER_OPS = {"decode_attention": 1, "norm_row_linear": 2, "row_linear_add": 2}  # calls per layer and token


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    edit = EditConfig(use_und_image_vae=True, use_und_image_vae_as_noise=True)
    write_random_checkpoint(folder, preset("tiny", edit), seed=1)
    return folder


@pytest.fixture(scope="module")
def pipeline(checkpoint: Path) -> Pipeline:
    return Pipeline.load(checkpoint, device="cpu", dtype="fp32")


@dataclass
class Range:
    """One range of a trace with those that lie directly in it."""

    name: str
    inside: list[Range] = field(default_factory=list)

    def names(self) -> list[str]:
        return [child.name for child in self.inside]

    def find(self, name: str) -> list[Range]:
        """Every range of that name below this one."""
        deeper = [found for child in self.inside for found in child.find(name)]
        return [child for child in self.inside if child.name == name] + deeper


def read(path: Path) -> Range:
    """The ranges of a trace file as a tree; checks that none crosses the end of another."""
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    events = [e for e in json.loads(text)["traceEvents"] if e.get("cat") == "user_annotation"]
    events.sort(key=lambda event: (event["ts"], -event["dur"]))
    root = Range("")
    open_ranges: list[tuple[float, Range]] = [(float("inf"), root)]
    for event in events:
        end = event["ts"] + event["dur"]
        while event["ts"] >= open_ranges[-1][0]:
            open_ranges.pop()
        assert end <= open_ranges[-1][0]
        found = Range(event["name"])
        open_ranges[-1][1].inside.append(found)
        open_ranges.append((end, found))
    return root


def without_op_ranges(names: Sequence[str]) -> list[str]:
    return [name for name in names if " [" not in name]


@pytest.fixture(scope="module")
def traced(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> tuple[Range, Image.Image]:
    """One request of text to image, as a tree of ranges, and its image."""
    path = tmp_path_factory.mktemp("traces") / "generate.json"
    with trace.recorded(path, pipeline.device):
        result = pipeline.generate("a red circle", steps=STEPS, seed=3, draft_window=1)
    return read(path), result[0]


def test_stages_and_steps_are_nested_in_order(traced: tuple[Range, Image.Image], pipeline: Pipeline) -> None:
    request, _ = traced
    assert request.names() == ["plan", "render"]
    plan, render = request.inside
    count = pipeline.config.image_tokens.tokens_per_image
    assert without_op_ranges(plan.names()) == ["ar.prefill", *(f"ar.token {i}" for i in range(count))]
    steps = [f"dit.step {i}" for i in range(STEPS)]
    expected = ["dit.tables", "connector", "connector", "dit.condition", *steps, "vae.decode"]
    assert without_op_ranges(render.names()) == expected


def test_every_op_call_is_a_range_in_its_step(
    traced: tuple[Range, Image.Image], pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many ranges as calls, by a count that the trace has no part in; none outside a stage."""
    request, _ = traced
    calls: dict[str, int] = {}

    def counting(op: Any) -> Any:
        call = type(op).__call__

        def run(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls[self.name] = calls.get(self.name, 0) + 1
            return call(self, *args, **kwargs)

        return run

    monkeypatch.setattr(type(ops.rms_norm), "__call__", counting(ops.rms_norm))
    pipeline.generate("a red circle", steps=STEPS, seed=3, draft_window=1)
    found: dict[str, int] = {}

    def count(parent: Range) -> None:
        for child in parent.inside:
            if match := re.fullmatch(r"(\w+) \[(\w+)\]", child.name):
                found[match[1]] = found.get(match[1], 0) + 1
                assert not without_op_ranges(child.names())
            count(child)

    count(request)
    assert {name: found.get(name, 0) for name in calls} == {name: calls[name] for name in calls}
    token = request.find("ar.token 0")[0]
    layers = pipeline.config.ar.num_layers
    for op, calls_per_layer in LAYER_OPS.items():
        assert sum(name.startswith(f"{op} [") for name in token.names()) == calls_per_layer * layers


def test_an_edit_shows_how_its_reference_was_read(pipeline: Pipeline, tmp_path: Path) -> None:
    path = tmp_path / "edit.json.gz"
    with trace.recorded(path, pipeline.device, tokens=None):
        pipeline.edit("make it blue", Image.new("RGB", (40, 30), "red"), steps=1)
    reference = read(path).find("reference")[0]
    assert without_op_ranges(reference.names()) == ["vae.encode", "tatok.encode"]
    assert len(read(path).find("nearest_code [cpu]") + read(path).find("nearest_code [torch]")) == 1


def test_a_traced_image_is_the_untraced_one(
    traced: tuple[Range, Image.Image], pipeline: Pipeline, tmp_path: Path
) -> None:
    again = pipeline.generate("a red circle", steps=STEPS, seed=3, draft_window=1)[0]
    assert np.array_equal(np.asarray(again), np.asarray(traced[1]))


def test_a_long_plan_is_traced_in_its_first_tokens(pipeline: Pipeline, tmp_path: Path) -> None:
    """Collecting goes on after the plan, and in the plan of the next request."""
    path = tmp_path / "short.json"
    with trace.recorded(path, pipeline.device, tokens=2):
        pipeline.generate("a", steps=1)
        pipeline.generate("b", steps=1)
    request = read(path)
    assert request.names() == ["plan", "render"] * 2
    for plan in request.find("plan"):
        tokens = [name for name in plan.names() if name.startswith("ar.token")]
        assert tokens == ["ar.token 0", "ar.token 1"]
    assert len(request.find("vae.decode")) == 2


def test_stages_called_alone_are_named_too(pipeline: Pipeline, tmp_path: Path) -> None:
    with trace.recorded(tmp_path / "a.json", pipeline.device):
        plan = pipeline.plan("a", token_ids=_image_tokens(pipeline))
        pipeline.render(plan, steps=1, output="latent")
    assert read(tmp_path / "a.json").names() == ["plan", "render"]


def _image_tokens(pipeline: Pipeline) -> torch.Tensor:
    ids = pipeline.config.image_tokens
    return ids.image_token_range.start + torch.arange(ids.tokens_per_image)


def test_ranges_end_with_the_block() -> None:
    """A call outside a trace goes to the implementation itself, forced or not."""
    x, weight = torch.ones(2, 4), torch.ones(4)
    seen: list[str] = []

    def make_range(name: str) -> AbstractContextManager[None]:
        seen.append(name)
        return nullcontext()

    ops.rms_norm(x, weight, 1e-6)
    with trace.ranges(make_range):
        ops.rms_norm(x, weight, 1e-6)
        with ops.force("rms_norm", "torch"):
            ops.rms_norm(x, weight, 1e-6)
        with trace.span("stage"), trace.span("step", 4):
            pass
    with ops.force("rms_norm", "torch"):
        ops.rms_norm(x, weight, 1e-6)
    ops.rms_norm(x, weight, 1e-6)
    chosen = next(
        c.implementation for c in ops.choices("cpu", torch.float32) if c.op == "rms_norm" and c.chosen
    )
    assert seen == [f"rms_norm [{chosen}]", "rms_norm [torch]", "stage", "step 4"]
    assert trace.span("a") is trace.span("b", 1)


def test_a_block_that_fails_leaves_no_file_and_no_ranges(tmp_path: Path) -> None:
    def failing() -> None:
        with trace.recorded(tmp_path / "a.json"):
            ops.rms_norm(torch.ones(1, 4), torch.ones(4), 1e-6)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert list(tmp_path.iterdir()) == []
    assert trace.span("a") is trace.span("b")


def test_other_file_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match=r"\.json or \.json\.gz"), trace.recorded(tmp_path / "a.txt"):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_nvtx_needs_a_gpu() -> None:
    with pytest.raises(DeviceError, match="NVTX ranges need a GPU"), trace.nvtx():
        pass


@pytest.mark.gpu
def test_nvtx_ranges_open_and_close() -> None:
    with trace.nvtx():
        ops.rms_norm(torch.ones(1, 4, device="cuda"), torch.ones(4, device="cuda"), 1e-6)


def test_the_command_writes_a_trace(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, target = tmp_path / "image.png", tmp_path / "traces" / "trace.json"
    options = ["--steps", "1", "--dtype", "fp32", "--device", "cpu", "--quiet", "--out", str(out)]
    options += ["--model", str(checkpoint), "--trace", str(target), "--trace-tokens", "1"]
    assert main(["generate", "a red circle", *options]) == 0
    assert read(target).names() == ["plan", "render"]
    assert len(read(target).find("ar.token 1")) == 0
    assert capsys.readouterr().out.split() == [str(out)]


def test_bench_traces_a_call_of_every_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "stages.json"
    options = ["--model", "tiny", "--device", "cpu", "--dtype", "fp32", "--work", str(tmp_path), "--quick"]
    options += [
        "--stages",
        "connector,dit.step,ar.token",
        "--baselines",
        "none",
        "--quiet",
        "--out",
        str(tmp_path),
    ]
    assert main(["bench", *options, "--trace", str(target)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(target)
    benched = [found for found in read(target).inside if found.name.startswith("bench ")]
    assert [found.name for found in benched] == ["bench ar.token", "bench connector", "bench dit.step"]
    assert without_op_ranges(benched[1].names()) == ["connector", "connector"]
    for found, op in zip(benched, ("row_linear", "", "relu_linear_attention"), strict=True):
        assert not op or any(name.startswith(f"{op} [") for name in names_below(found))


def names_below(parent: Range) -> list[str]:
    return [name for child in parent.inside for name in (child.name, *names_below(child))]
