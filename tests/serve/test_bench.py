"""`bench serve`: what is sent, what is noted of it, and what it comes to."""

from __future__ import annotations

import asyncio
import csv
import functools
import json
import os
from pathlib import Path
from typing import Any

import pytest

from blip3o_rt.cli import main
from blip3o_rt.pipeline import Pipeline

pytest.importorskip("httpx")
pytest.importorskip("fastapi")

import httpx

from blip3o_rt.measure.serve.load import Load, Sample, run
from blip3o_rt.measure.serve.record import summary, table, write
from blip3o_rt.measure.serve.subject import measure, one_call
from tests.serve.conftest import RunningServer


def measured(folder: Path, *arguments: str, code: int = 0) -> tuple[dict[str, Any], list[dict[str, str]]]:
    assert main(["bench", "serve", *arguments, "--out", str(folder)]) == code
    with (folder / "serve.csv").open() as file:
        rows = list(csv.DictReader(file))
    return json.loads((folder / "serve.json").read_text()), rows


def most_in_flight(rows: list[dict[str, str]]) -> int:
    moments = [(float(row["sent"]), 1) for row in rows] + [(float(row["ended"]), -1) for row in rows]
    running, most = 0, 0
    for _, change in sorted(moments):
        running += change
        most = max(most, running)
    return most


def test_a_closed_loop_holds_so_many_in_flight(server: RunningServer, tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text("slow circle\na square\n")
    found, rows = measured(
        tmp_path,
        *("--url", server.url, "--requests", "9", "--concurrency", "3", "--steps", "4", "--deadline", "1000"),
        *("--prompts", str(tmp_path / "prompts")),
    )
    assert (found["load"]["loop"], found["completed"], found["images"], found["failed"]) == (
        "closed",
        9,
        9,
        {},
    )
    assert found["share_within_deadline"] == 1.0
    assert most_in_flight(rows) == 3
    for row in rows:
        assert 0 < float(row["time_to_first_preview"]) <= float(row["latency"])
        assert float(row["queue"]) >= 0
    for name in ("latency", "queue", "time_to_first_preview"):
        assert found[name]["p50"] <= found[name]["p99"]
    page = (tmp_path / "serve.html").read_text()
    assert page.count("<svg") == 2
    assert f"{found['images_per_second']:.3f}" in page


def test_an_open_loop_sends_whatever_is_in_flight(server: RunningServer, tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text("slow circle\n")
    arguments = ["--url", server.url, "--requests", "12", "--rate", "inf", "--steps", "4", "--previews", "0"]
    found, rows = measured(tmp_path, *arguments, "--no-seed", "--prompts", str(tmp_path / "prompts"))
    assert (found["load"]["loop"], found["load"]["concurrency"], found["completed"]) == ("open", None, 12)
    assert most_in_flight(rows) == 12
    assert found["time_to_first_preview"] == {}


def test_what_fails_is_counted_by_reason_and_is_not_in_time(
    server: RunningServer,
    tmp_path: Path,
) -> None:
    (tmp_path / "prompts").write_text("a circle\nbug\n")
    arguments = [
        "--url",
        server.url,
        "--requests",
        "6",
        "--steps",
        "2",
        "--warm-up",
        "0",
        "--deadline",
        "1000",
    ]
    found, rows = measured(tmp_path, *arguments, "--prompts", str(tmp_path / "prompts"), code=1)
    assert (found["completed"], found["images"], found["share_within_deadline"]) == (3, 3, 0.5)
    assert found["failed"] == {"generation_failed": 3}
    assert [row["error"] for row in rows] == ["", "generation_failed"] * 3


def test_a_server_that_is_not_there_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--url", "http://127.0.0.1:9", "--requests", "2", "--warm-up", "0"]
    found, _ = measured(tmp_path, *arguments, code=1)
    assert found["failed"] == {"ConnectError": 2}
    assert "failed: 2 ConnectError" in capsys.readouterr().out


def test_the_numbers_of_known_samples(tmp_path: Path) -> None:
    samples = [
        Sample(i, sent=i, ended=i + 1.0 + i, preview=i + 0.5, queue=0.1, images=2, status=200)
        for i in range(5)
    ]
    samples.append(Sample(5, sent=0.0, ended=20.0, status=503, error="engine_lost"))
    found = summary(Load("http://x", ["a"], requests=6), samples, deadline=3.0)
    assert (found["seconds"], found["images"], found["images_per_second"]) == (20.0, 10, 0.5)
    assert (found["first_image"], found["share_within_deadline"]) == (1.0, 0.5)
    assert found["latency"]["mean"] == found["latency"]["p50"] == 3.0  # of 1 to 5 seconds
    assert found["latency"]["p90"] == pytest.approx(4.6)
    assert found["time_to_first_preview"]["p99"] == 0.5
    text = table(found)
    assert "within 3 s: 50.0%" in text
    assert "failed: 1 engine_lost" in text
    assert {path.name for path in write(tmp_path, found, samples)} == {
        "serve.json",
        "serve.csv",
        "serve.html",
    }


def test_every_round_is_kept_and_medians_are_compared() -> None:
    ends = {0: (1.0, 4.0), 1: (3.0, 5.0), 2: (0.5, 2.0)}  # of the two requests of each round
    samples = [Sample(n, sent=0.0, ended=t, images=1, round=r) for r in ends for n, t in enumerate(ends[r])]
    samples.append(Sample(2, sent=0.0, ended=0.1, error="queue_full", round=1))
    calls = [{"images_per_second": speed, "first_image": speed / 10} for speed in (0.25, 2.0, 1.0)]
    found = summary(Load("http://x", ["a"], requests=2), samples, None, calls)
    assert [(one["seconds"], one["images"], one["first_image"]) for one in found["rounds"]] == [
        (4.0, 2, 1.0),
        (5.0, 2, 3.0),
        (2.0, 2, 0.5),
    ]
    assert (found["images_per_second"], found["first_image"], found["seconds"]) == (0.5, 1.0, 11.0)
    assert found["one_call"] == {"images_per_second": 1.0, "first_image": 0.1, "rounds": calls}
    cells = [line.split() for line in table(found).splitlines()]
    assert ["2", "0.400", "3.000", "2.000", "0.200"] in cells
    assert ["median", "0.500", "1.000", "1.000", "0.100"] in cells


def sent_to(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The bodies of requests, in a list that grows; whoever answers them has drawn an image."""
    bodies: list[dict[str, Any]] = []

    def answer(request: Any) -> Any:
        bodies.append(json.loads(request.content))
        return httpx.Response(200, json={"data": [{}]})

    client = functools.partial(httpx.AsyncClient, transport=httpx.MockTransport(answer))
    monkeypatch.setattr("blip3o_rt.measure.serve.load.httpx.AsyncClient", client)
    return bodies


def test_a_load_draws_the_images_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    bodies = sent_to(monkeypatch)
    prompts, calls = ["a", "b"], []
    asyncio.run(run(Load("http://x", prompts, 6, concurrency=2, seed=5, previews=0)))

    def generate(_: Pipeline, texts: list[str], on_image: Any, **options: Any) -> None:
        calls.append((texts, options))
        for index in range(len(texts) * options["n"]):
            on_image(index, None)

    monkeypatch.setattr(Pipeline, "generate", generate)
    found = one_call({"max_batch": 2}, prompts, 3, 5, {"steps": 2, "size": "64x64"})()
    assert calls == 2 * [(prompts, {"n": 3, "seed": 5, "steps": 2})]  # once to warm it
    assert sorted((body["prompt"], body["seed"]) for body in bodies) == [
        (prompt, 5 + image) for prompt in prompts for image in range(3)
    ]
    assert 0 < found["first_image"] <= found["seconds"] == pytest.approx(6 / found["images_per_second"])


def test_load_and_call_take_turns_after_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    bodies = sent_to(monkeypatch)
    load = Load("http://x", ["a"], 3, previews=0)
    samples, calls = measure(load, 4, 2, lambda: {"sent before": len(bodies)})
    assert calls == [{"sent before": 7}, {"sent before": 10}]
    assert [(sample.round, sample.number) for sample in samples] == [
        (r, n) for r in range(2) for n in range(3)
    ]


@pytest.mark.exhaustive
def test_a_server_of_ours_beside_one_call(tmp_path: Path) -> None:
    found, rows = measured(tmp_path, "--requests", "4", "--steps", "1", "--one-call", "--rounds", "2")
    assert (found["completed"], len(found["rounds"]), len(found["one_call"]["rounds"])) == (8, 2, 2)
    assert [row["round"] for row in rows] == ["0"] * 4 + ["1"] * 4


@pytest.mark.parametrize(
    "arguments",
    [
        *(["--requests", "0"], ["--rate", "-1"], ["--rounds", "0"], ["--prompts", os.devnull]),
        *(
            ["--one-call", "--url", "http://x"],
            ["--one-call", "--no-seed"],
            ["--one-call", "--requests", "9"],
        ),
    ],
)
def test_arguments_that_make_no_load_are_refused(arguments: list[str], tmp_path: Path) -> None:
    assert main(["bench", "serve", *arguments, "--out", str(tmp_path / "none")]) == 2
    assert not (tmp_path / "none").exists()
