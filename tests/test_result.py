"""What a request reports: seconds, rates and figures of what ran, and progress to callbacks and bars."""

from __future__ import annotations

import io
import json
import resource
import sys
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from blip3o_rt import result
from blip3o_rt.errors import Cancelled, ParameterError
from blip3o_rt.isolation import OwnSettings
from blip3o_rt.metadata import image_fields
from blip3o_rt.result import Progress, Report, Result, Run, Stage, peak_memory_bytes


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands at clock[0]."""
    now = [100.0]
    monkeypatch.setattr(result.time, "perf_counter", lambda: now[0])
    return now


def make_report(*stages: Stage) -> Report:
    return Report(
        stages, {"rms_norm": ("cpu",), "row_linear": ("cpu", "torch")}, 3 * 2**20, "cpu", "fp32", "exact"
    )


@contextmanager
def make_run(**options: Any) -> Iterator[Run]:
    cpu = torch.device("cpu")
    with OwnSettings(cpu, 1) as settings:
        yield Run(cpu, {}, set(), settings, **options)


def stages(run: Run) -> tuple[Stage, ...]:
    return run.report(dtype=torch.float32, tier="exact", switches={}).stages


def test_stages_add_up_in_the_order_they_first_ran(clock: list[float]) -> None:
    with make_run() as run:
        for seconds, name, work in ((1.0, "denoise", 30), (2.0, "decode", 1), (0.5, "denoise", 2)):
            with run.stage(name, work):
                clock[0] += seconds
        assert stages(run) == (Stage("denoise", 1.5, 32), Stage("decode", 2.0, 1))


def test_a_block_that_raises_is_charged_its_time_but_no_work(clock: list[float]) -> None:
    def fail(run: Run) -> None:
        with run.stage("denoise", 30):
            clock[0] += 4.0
            raise KeyError

    with make_run() as run:
        with pytest.raises(KeyError):
            fail(run)
        assert stages(run) == (Stage("denoise", 4.0, 0),)


class Terminal(io.StringIO):
    """A standard error that somebody watches."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "notebook", "show", "drawn"),
    [
        (Terminal(), False, True, True),
        (Terminal(), False, False, False),
        (io.StringIO(), False, True, False),
        (io.StringIO(), True, True, True),
        (io.StringIO(), True, False, False),
    ],
)
def test_bars_are_drawn_for_people_where_asked(
    monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, notebook: bool, show: bool, drawn: bool
) -> None:
    monkeypatch.setattr("sys.stderr", stream)
    if notebook:  # one without ipywidgets, where tqdm's own bars would be text on no terminal
        monkeypatch.setitem(sys.modules, "ipykernel.zmqshell", types.ModuleType("zmqshell"))
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    heard: list[Progress] = []
    with make_run(callback=heard.append, show=show) as run, run.stage("denoise", 2) as update:
        update(1)
        update(2)
    assert ("denoise" in stream.getvalue()) is drawn
    assert heard == [Progress("denoise", 1, 2), Progress("denoise", 2, 2)]


@pytest.mark.parametrize("stream", [None, io.TextIOWrapper(io.BytesIO())])
def test_no_bar_is_drawn_where_there_is_no_standard_error(
    monkeypatch: pytest.MonkeyPatch, stream: io.TextIOWrapper | None
) -> None:
    if stream is not None:
        stream.close()
    monkeypatch.setattr("sys.stderr", stream)
    with make_run(show=True) as run, run.stage("denoise", 2) as update:
        update(1)


def drawn(color: tuple[int, int, int], **fields: Any) -> Image.Image:
    image = Image.new("RGB", (2, 2), color)
    image.info.update(image_fields("x", 1, fields))
    return image


def test_images_never_replace_those_of_another_request(tmp_path: Path) -> None:
    red, blue = drawn((255, 0, 0), steps=1), drawn((0, 0, 255), steps=2)
    report = make_report()
    Image.new("RGB", (1, 1)).save(tmp_path / "001.png")
    names = [path.name for path in Result([red, blue], [], report).save(tmp_path)]
    assert names == ["000.png", "002.png"]
    assert [p.name for p in Result([blue, blue], [], report).save(tmp_path)] == ["002.png", "003.png"]
    assert [p.name for p in Result([red, blue], [], report).save(str(tmp_path))] == ["000.png", "002.png"]
    for name, image in (("000.png", red), ("002.png", blue), ("003.png", blue)):
        with Image.open(tmp_path / name) as saved:
            assert saved.tobytes() == image.tobytes()
    with Image.open(tmp_path / "001.png") as other:
        assert other.size == (1, 1)


@pytest.mark.parametrize(
    "directory", [None, 5, b"a", "a\0b", "a" * 5000, "file/below", "file", "~nobody-here/x"]
)
def test_what_is_no_folder_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, directory: object
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ParameterError, match=r"^directory is .*accepted is the name of a folder") as found:
        Result([drawn((1, 2, 3))], [], make_report()).save(directory)  # type: ignore[arg-type]
    assert "\n" not in str(found.value)


def test_no_thread_is_started_where_no_bar_was_asked_for() -> None:
    before = threading.active_count()
    with make_run() as run, run.stage("denoise", 2) as update:
        update(1)
        assert threading.active_count() == before


@pytest.mark.parametrize("answer", [False, np.False_, np.array(False), torch.tensor(False)])
def test_a_callback_that_returns_false_cancels(answer: object) -> None:
    with (
        pytest.raises(Cancelled, match="at tokens 1 of 3"),
        make_run(callback=lambda progress: answer) as run,
        run.stage("tokens", 3) as update,
    ):
        update(1)


@pytest.mark.parametrize("answer", [None, True, np.True_, 0, "", torch.tensor(True), np.zeros(3)])
def test_other_answers_go_on(answer: object) -> None:
    with make_run(callback=lambda progress: answer) as run, run.stage("tokens", 3) as update:
        update(1)


def test_rates() -> None:
    report = make_report(Stage("tokens", 2.0, 800), Stage("denoise", 3.0, 30), Stage("decode", 0.5, 2))
    assert report.total_seconds == 5.5
    assert report.tokens_per_second == 400.0
    assert report.milliseconds_per_step == 100.0
    assert [stage.rate for stage in report.stages] == ["400.0 tokens/s", "100.0 ms/step", "250.0 ms/image"]


def test_stages_that_did_not_run_have_no_rate() -> None:
    report = make_report()
    assert (report.tokens_per_second, report.milliseconds_per_step, report.total_seconds) == (0.0, 0.0, 0)
    assert report.stage("tokens") == Stage("tokens", 0.0, 0)
    assert Stage("tokens", 0.0, 5).rate == ""
    assert Stage("another", 1.0, 5).rate == ""


def test_json_form() -> None:
    data = json.loads(json.dumps(make_report(Stage("tokens", 2.0, 800)).to_dict()))
    assert data["stages"] == {"tokens": {"seconds": 2.0, "work": 800}}
    assert data["implementations"] == {"rms_norm": ["cpu"], "row_linear": ["cpu", "torch"]}
    assert (data["device"], data["dtype"], data["tier"]) == ("cpu", "fp32", "exact")
    assert data["peak_memory_bytes"] == 3 * 2**20


def test_table_holds_every_figure() -> None:
    table = str(make_report(Stage("tokens", 2.0, 1), Stage("denoise", 3.0, 30)))
    lines = [line.split() for line in table.splitlines()]
    assert ["tokens", "2.000", "1", "token", "0.5", "tokens/s"] in lines
    assert ["denoise", "3.000", "30", "steps", "100.0", "ms/step"] in lines
    assert ["total", "5.000"] in lines
    assert table.splitlines()[-3:] == [
        "cpu, fp32, tier exact; peak memory 3 MiB",
        "on cpu: rms_norm, row_linear",
        "on torch: row_linear",
    ]


def test_peak_memory_is_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    before = peak_memory_bytes()
    block = torch.ones(64 * 2**20 // 4)
    after = peak_memory_bytes(torch.device("cpu"))
    assert after >= before
    assert after > block.nbytes
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    monkeypatch.setattr(result.sys, "platform", "darwin")
    assert peak_memory_bytes() < 2 * kib
