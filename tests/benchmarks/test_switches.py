"""The cost of the switches is measured of every one of them, and the page is what the records give."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import switches
from blip3o_rt.switches import SWITCHES, check_switches
from tests.benchmarks.test_page import row


def test_every_switch_is_measured_with_settings_that_it_takes() -> None:
    assert list(switches.SETTINGS) == list(SWITCHES)
    assert switches.STAGES.keys() == SWITCHES.keys()
    for name, settings in switches.SETTINGS.items():
        for setting, _ in settings:
            check_switches({name: setting})
    on_a_cpu, on_a_gpu = (list(switches.cases(device)) for device in ("cpu", "cuda"))
    assert on_a_cpu[0] == on_a_gpu[0] == switches.Case({})
    assert {"dit_weights": "int8"} in [case.switches for case in on_a_cpu]
    assert {"dit_weights": "int8"} not in [case.switches for case in on_a_gpu]
    fp8 = {"dit_weights": "fp8"}
    assert [case.defined for case in on_a_cpu if case.switches == fp8] == [True]
    assert [case.defined for case in on_a_gpu if case.switches == fp8] == [False]


def test_what_is_computed_by_its_definition_is_not_timed() -> None:
    table = switches.table(record("", entry("some", seconds=[])))
    assert row(table, "some")[6:] == ["0.9900", "", ""]
    (fp8,) = (case for case in switches.cases("cpu") if case.switches == {"dit_weights": "fp8"})
    pipeline = switches.load(fp8, None, "cpu", "fp32")
    assert pipeline.switches == fp8.switches


def entry(label: str, **changes: Any) -> dict[str, Any]:
    fields = {"switches": {label: "2"}, "label": label, "steps": 30, "right": 3, "n": 4, "stage": "denoise"}
    measured = {"psnr": [60.0, 50.0, None, None], "ssim": [1.0, 0.99, 1.0, 1.0]}
    times = {"seconds": [1.0, 2.0, 3.0], "seconds_exact": [3.0, 5.0, 4.0]}
    return {**fields, **measured, **times, **changes}


def record(created: str, *entries: dict[str, Any], out: str = "") -> dict[str, Any]:
    model = {"size": "shapes", "dtype": "fp32", "device": "cpu", "threads": 1}
    machine = {"cpu": "a processor", "gpu": None}
    head = {"kind": "switches", "created": created, "command": ["measure", out]}
    return {**head, "machine": machine, "model": model, "entries": list(entries)}


def test_rows_say_what_was_measured() -> None:
    table = switches.table(
        record("", entry("some"), entry("none", psnr=[None] * 4), entry("exact", switches={}))
    )
    assert row(table, "some") == [
        "some",
        "30",
        "3 of 4",
        "30 to 95%",
        "equal",
        "50.0 dB",
        "0.9900",
        "2.00x",
        "denoise",
    ]
    assert row(table, "none")[4:6] == ["equal", "equal"]
    assert row(table, "exact")[4:] == [""] * 5


def test_the_page_has_the_newest_record_between_its_marks(tmp_path: Path) -> None:
    for day in ("02", "01"):
        (tmp_path / day).mkdir()
        (tmp_path / day / "switches.json").write_text(
            json.dumps(record(f"2026-01-{day}", entry(f"of {day}"), out=f"--out {day}"))
        )
    text = f"before\n{switches.BEGIN}\nstale\n{switches.END}\nafter\n"
    found = switches.rendered(text, tmp_path)
    assert "of 02" in found
    assert "of 01" not in found
    assert "stale" not in found
    assert found.startswith("before\n")
    assert found.endswith(f"{switches.END}\nafter\n")
    assert switches.rendered(found, tmp_path) == found


def test_measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One request of each category: a switch that changes nothing gives equal images, others do not."""
    on = {}, {"step_cache": "1"}, {"step_cache": "3"}
    chosen = [switches.Case(case, 4, "denoise") for case in on]
    monkeypatch.setattr(switches, "cases", lambda device: chosen)
    assert switches.main(["--count", "1", "--out", str(tmp_path / "new" / "folder")]) == 0
    found = json.loads((tmp_path / "new" / "folder" / "switches.json").read_text())
    assert found["complete"]
    exact, same, other = found["entries"]
    assert exact["n"] == same["n"] == other["n"] == len(same["seconds"]) == len(same["seconds_exact"]) == 4
    assert exact["right"] == same["right"]
    assert same["psnr"] == [None] * 4
    assert same["ssim"] == pytest.approx([1.0] * 4)
    assert all(psnr is not None and psnr > 20 for psnr in other["psnr"])


def test_an_interrupt_leaves_whole_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = [switches.Case({}, 2), switches.Case({"step_cache": "2"}, 2, "denoise")]
    monkeypatch.setattr(switches, "cases", lambda device: chosen)
    compared = switches.likeness
    calls = itertools.count()

    def interrupted(*images: Any) -> Any:
        if next(calls) >= 3:  # two cases of a round, and one of the next
            raise KeyboardInterrupt
        return compared(*images)

    monkeypatch.setattr(switches, "likeness", interrupted)
    assert switches.main(["--count", "1", "--out", str(tmp_path)]) == 130
    found = json.loads((tmp_path / "switches.json").read_text())
    assert not found["complete"]
    assert [(e["n"], len(e["psnr"]), len(e["seconds_exact"])) for e in found["entries"]] == [(1, 1, 1)] * 2
    with pytest.raises(KeyboardInterrupt):  # nothing is there after less than a round
        switches.main(["--count", "1"])
