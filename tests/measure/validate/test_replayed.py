"""Where work is recorded, validate looks at replays: the lines pass, and a replay that differs is named."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import TypeVar

import pytest

from blip3o_rt.graphs import GraphRunner
from blip3o_rt.measure.validate.ar import ar_lines
from blip3o_rt.measure.validate.determinism import determinism_lines
from blip3o_rt.measure.validate.golden import Recording, golden_lines
from blip3o_rt.measure.validate.line import Line
from blip3o_rt.measure.validate.subject import Subject
from blip3o_rt.pipeline.renderer import Renderer
from tests.captured_graph import CapturedGraphs
from tests.measure.validate.test_golden import CPU, no_images

R = TypeVar("R")
TEXT, EDIT = (f"{mode}replayed as graphs and run without" for mode in ("", "edit: "))


class WithoutTheLastCall(CapturedGraphs):
    """Captures all but the last call: of a token step, that the hidden state is kept."""

    def capture(self, work: Callable[[], R]) -> tuple[Callable[[], None], R]:
        replay, result = super().capture(work)
        self._written[-1].calls.pop()
        return replay, result


def record(graphs: CapturedGraphs, monkeypatch: pytest.MonkeyPatch) -> CapturedGraphs:
    """The graphs of every device from now on."""
    monkeypatch.setattr(GraphRunner, "of", lambda _: GraphRunner(graphs))
    return graphs


def lines_of(items: Iterable[Line | str]) -> list[Line]:
    return [item for item in items if isinstance(item, Line)]


def failed(items: Iterable[Line | str]) -> set[str]:
    return {line.name for line in lines_of(items) if not line.passed}


def test_tokens(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = record(CapturedGraphs(), monkeypatch)
    assert failed(ar_lines(subject, ["fp32"])) == set()
    assert graphs.replayed == subject.scope.tokens
    record(WithoutTheLastCall(), monkeypatch)
    assert "hidden states, token by token" in failed(ar_lines(subject, ["fp32"]))


def test_images(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = record(CapturedGraphs(), monkeypatch)
    lines = lines_of(determinism_lines(subject, ["fp32"]))
    assert all(line.passed for line in lines)
    assert {TEXT, EDIT} <= {line.name for line in lines}
    assert graphs.replayed > 0
    record(WithoutTheLastCall(), monkeypatch)
    assert {TEXT, EDIT} <= failed(determinism_lines(subject, ["fp32"]))


def test_without_graphs_there_is_nothing_to_compare(subject: Subject) -> None:
    items = list(determinism_lines(subject, ["fp32"]))
    assert items[0] == "determinism: nothing is replayed on this device, so there are no graphs to compare"
    assert not {TEXT, EDIT} & {line.name for line in lines_of(items)}


def test_a_recording(reference_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = record(CapturedGraphs(), monkeypatch)
    monkeypatch.setattr(Renderer, "capture", lambda *_, **__: None)  # the tokens are enough to see, and quick
    lines = lines_of(islice(golden_lines(Recording(reference_dir / "t2i"), CPU, no_images), 2))
    assert [line.name for line in lines] == ["greedy tokens", "hidden states, token by token"]
    assert all(line.passed for line in lines)
    assert graphs.replayed > 0
