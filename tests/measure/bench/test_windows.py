"""bench windows: the table of a checkpoint's tokens a pass, and that it stops where a window changes bits."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from benchmarks import render
from blip3o_rt import Pipeline
from blip3o_rt.ar.engine import TokenEngine, TokenPlan, TokenPrompt
from blip3o_rt.cli import main
from blip3o_rt.measure.bench.windows import ROWS, pass_times, window_times
from blip3o_rt.params import SamplingParams

PROMPT = "a large red circle on a blue background"


def test_the_table_of_the_embedded_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "windows.json"
    options = ["--prompt", PROMPT, "--windows", "1,8,auto", "--rounds", "1", "--out", str(out)]
    assert main(["bench", "windows", *options]) == 0
    record = json.loads(out.read_text())
    one, eight, auto = record["windows"]
    assert (one["window"], one["tokens_per_pass"], one["speedup"]) == (1, 1.0, 1.0)
    assert eight["tokens_per_pass"] >= 3
    assert auto["window"] == "auto"
    assert [found["rows"] for found in record["passes"]] == list(ROWS)
    assert set(record["passes"][1]["image_seconds"]) == {"1.5", "2"}  # what two rows can draw
    printed = capsys.readouterr().out
    assert f"{eight['tokens_per_pass']:.2f}" in printed
    assert "computed from the pass, not measured" in printed
    assert record["command"][0] == "blip3o-rt"
    page = render.page(tmp_path)
    assert "#### Several tokens a pass: shapes, " in page
    assert f"| {eight['tokens_per_pass']:.2f} " in page


def test_a_record_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blip3o_rt.cli.drawing.load_pipeline", lambda arguments: pytest.fail("it worked"))
    assert main(["bench", "windows", "--out", str(tmp_path)]) == 2
    assert f"--out is {tmp_path}, a folder: accepted is a file's path" in capsys.readouterr().err


def test_a_window_that_changes_the_image_stops_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = Pipeline.load(max_batch=1)
    generate = TokenEngine.generate

    def wrong(engine: TokenEngine, prompts: list[TokenPrompt]) -> list[TokenPlan]:
        (plan,) = generate(engine, prompts)
        if prompts[0].draft_window == 2:
            plan = dataclasses.replace(plan, hidden_states=torch.zeros_like(plan.hidden_states))
        return [plan]

    monkeypatch.setattr(TokenEngine, "generate", wrong)
    with pytest.raises(AssertionError, match="window 2: other bits"):
        window_times(pipeline, [PROMPT], [1, 2], SamplingParams(), 1, lambda _: None)


def test_nothing_is_left_of_passes_that_were_timed() -> None:
    pipeline = Pipeline.load(max_batch=1)
    found = pass_times(pipeline, PROMPT, 1)
    assert found[0].relative == 1.0
    assert not pipeline._planner.engine.busy
