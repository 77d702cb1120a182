"""blip3o-rt score, with stand-ins for the model: files, tables, exit codes, interruption and refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from blip3o_rt.cli import drawing
from blip3o_rt.measure.shapes.scene import Scene
from blip3o_rt.measure.shapes.tasks import Task, draw_foreign_tasks, draw_tasks
from tests.cli.conftest import Command
from tests.measure.shapes.stand_in import StandIn, something_else, what_is_asked

COUNT, SEED = 2, 9
OPTIONS = ("--count", str(COUNT), "--seed", str(SEED))
Use = Callable[[Callable[[Task], Scene]], StandIn]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Use:
    """Puts a stand-in that answers so in the place of the loaded model."""

    def put(answer: Callable[[Task], Scene]) -> StandIn:
        model = StandIn(draw_tasks(COUNT, SEED) + draw_foreign_tasks(COUNT, SEED), answer)
        monkeypatch.setattr(drawing, "load_pipeline", lambda arguments, **options: model)
        return model

    return put


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "score.json").read_text())


def test_a_model_that_draws_what_it_is_asked(command: Command, use: Use) -> None:
    model = use(what_is_asked)
    assert command("score", *OPTIONS, "--steps", "7", "--top-k", "1", "--fail-under", "100") == 0
    assert command.output.splitlines()[:2] == ["out/score/score.json", "out/score/score.png"]
    assert "all 8 100.0% 67.6 to 100.0%" in " ".join(command.output.split())
    assert command.errors == ""
    assert command.files() == ["out/score/score.json", "out/score/score.png"]
    options = {"steps": 7, "guidance": 2.0, "temperature": 1.0, "top_k": 1, "top_p": 0.95}
    assert "foreign edit 2 100.0% 34.2 to 100.0%" in " ".join(command.output.split())
    assert model.calls == [{**options, "image_tokens_only": True, "draft_window": "auto"}] * 10

    found = record(command.folder / "out/score")
    assert (found["kind"], found["version"], found["complete"]) == ("score", 1, True)
    settings = {"count": COUNT, "seed": SEED, "world": "both", **options}
    assert found["settings"] == {**settings, "image_tokens_only": True, "draft_window": "auto"}
    assert found["model"]["size"] == "shapes"
    assert (found["model"]["dtype"], found["model"]["tier"]) == ("fp32", "exact")
    assert found["command"][0] == "blip3o-rt"
    every = {"category": "all", "property": "right", "right": 8, "n": 8, "share": 1.0, "high": 1.0}
    assert {**every, "low": pytest.approx(0.6756, abs=1e-4)} in found["scores"]
    assert [image["seed"] for image in found["pictures"][:8]] == list(range(SEED, SEED + 8))
    assert all(image["right"] and image["plan"] for image in found["pictures"])
    edits = [image["edit"] for image in found["pictures"]]
    assert edits == [*[None] * 3, "recolour", *[None] * 3, "background", "recolour", "background"]
    with Image.open(command.folder / "out/score/score.png") as sheet:
        assert sheet.width > 500


def test_a_model_that_draws_something_else(command: Command, use: Use) -> None:
    use(something_else)
    assert command("score", *OPTIONS, "--out", "elsewhere", "--quiet") == 0
    assert command.output.splitlines() == ["elsewhere/score.json", "elsewhere/score.png"]
    found = record(command.folder / "elsewhere")
    assert not any(image["right"] for image in found["pictures"])
    assert command("score", *OPTIONS, "--fail-under", "85") == 1
    assert command.errors.splitlines() == [
        "blip3o-rt: 0.0% of the images are right, under the bar of 85%",
        "blip3o-rt: 0.0% of the foreign edits are right, under the bar of 85%",
    ]


@pytest.mark.parametrize(("world", "images"), [("own", 8), ("foreign", 2), ("both", 10)])
def test_a_world_alone(command: Command, use: Use, world: str, images: int) -> None:
    use(what_is_asked)
    assert command("score", *OPTIONS, "--world", world, "--quiet", "--fail-under", "100") == 0
    assert len(record(command.folder / "out/score")["pictures"]) == images


@pytest.mark.parametrize(("variable", "threads"), [(None, 1), ("2", 2)])
def test_one_thread_unless_told_otherwise(
    command: Command, use: Use, monkeypatch: pytest.MonkeyPatch, variable: str | None, threads: int
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        use(what_is_asked)
        assert command("score", *OPTIONS, "--quiet") == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert record(command.folder / "out/score")["model"]["threads"] == threads


@pytest.mark.parametrize(("bar", "code"), [("75", 0), ("75.1", 1)])
def test_the_bar_is_what_must_be_reached(command: Command, use: Use, bar: str, code: int) -> None:
    use(lambda task: something_else(task) if task.category == "two" else task.scene)
    assert command("score", *OPTIONS, "--fail-under", bar, "--quiet") == code


def test_an_interrupt_keeps_what_was_drawn(command: Command, use: Use) -> None:
    def interrupted(task: Task) -> Scene:
        if task.seed == SEED + 5:
            raise KeyboardInterrupt
        return task.scene

    use(interrupted)
    assert command("score", *OPTIONS, "--fail-under", "100") == 130
    assert command.errors.splitlines() == ["blip3o-rt: 5 of 10 images were drawn", "blip3o-rt: interrupted"]
    assert "all 5 100.0%" in " ".join(command.output.split())
    found = record(command.folder / "out/score")
    assert found["complete"] is False
    assert len(found["pictures"]) == 5
    assert "out/score/score.png" in command.files()


def test_an_interrupt_before_the_first_image(command: Command, use: Use) -> None:
    def interrupted(task: Task) -> Scene:
        raise KeyboardInterrupt

    use(interrupted)
    assert command("score", *OPTIONS) == 130
    assert command.files() == ["out/score/score.json"]
    assert record(command.folder / "out/score")["pictures"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--count", "0"), "--count is 0: accepted is a whole number from 1 to 10000"),
        (("--count", "many"), "argument --count: invalid int value: 'many' (see blip3o-rt score --help)"),
        (("--fail-under", "101"), "--fail-under is 101: accepted is a percentage from 0 to 100"),
        (("--fail-under", "nan"), "--fail-under is nan: accepted is a percentage from 0 to 100"),
        (("--steps", "0"), "steps is 0: accepted is a whole number from 1 to 1000"),
        (("--seed", "-1"), "seed is -1: accepted is a whole number from 0 to 9223372036854775807"),
        (("--seed", str(2**63 - 1)), "the last image's seed, seed + 4 x count, may be at most"),
        (("--out", "file"), "--out is file, a file: accepted is a folder"),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_is_loaded(
    command: Command, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.setattr(drawing, "load_pipeline", None)
    (command.folder / "file").touch()
    assert message in command.refused("score", *arguments)


def test_an_unknown_tier_is_refused(command: Command) -> None:
    assert "tier is 'fats': accepted is 'exact'" in command.refused("score", "--tier", "fats")


def test_a_model_of_something_else_is_refused(command: Command, use: Use) -> None:
    use(what_is_asked).config.image_size = 1024
    assert "accepted is a model of the shapes, 64 px and 64 tokens" in command.refused("score", *OPTIONS)
