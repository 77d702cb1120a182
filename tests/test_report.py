"""A report's seconds, rates and figures are those of what ran."""

from __future__ import annotations

import json
import resource

import pytest
import torch

from blip3o_rt import report as report_module
from blip3o_rt.report import Report, Stage, StageTimer, peak_memory_bytes


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands at clock[0]."""
    now = [100.0]
    monkeypatch.setattr(report_module.time, "perf_counter", lambda: now[0])
    return now


def make_report(*stages: Stage) -> Report:
    return Report(
        stages, {"rms_norm": ("cpu",), "row_linear": ("cpu", "torch")}, 3 * 2**20, "cpu", "fp32", "exact"
    )


def test_stages_add_up_in_the_order_they_first_ran(clock: list[float]) -> None:
    timer = StageTimer()
    for seconds, name, work in ((1.0, "denoise", 30), (2.0, "decode", 1), (0.5, "denoise", 2)):
        with timer.stage(name, work):
            clock[0] += seconds
    assert timer.stages == (Stage("denoise", 1.5, 32), Stage("decode", 2.0, 1))


def test_a_block_that_raises_is_charged_its_time_but_no_work(clock: list[float]) -> None:
    timer = StageTimer()

    def fail() -> None:
        with timer.stage("denoise", 30):
            clock[0] += 4.0
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert timer.stages == (Stage("denoise", 4.0, 0),)


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
    monkeypatch.setattr(report_module.sys, "platform", "darwin")
    assert peak_memory_bytes() < 2 * kib
