"""Scoring: the tasks, the counting, the intervals and the contact sheet, with stand-ins for the model."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
from scipy.stats import binomtest

from blip3o_rt.errors import GenerationError, ParameterError
from blip3o_rt.measure.shapes import contact_sheet as sheets
from blip3o_rt.measure.shapes.edits import EDIT_KINDS
from blip3o_rt.measure.shapes.render import render
from blip3o_rt.measure.shapes.scene import Scene, is_drawable, is_held_out
from blip3o_rt.measure.shapes.score import (
    Drawn,
    Score,
    check_model,
    draw_and_judge,
    scores,
    share_right,
    table,
    wilson_interval,
)
from blip3o_rt.measure.shapes.tasks import CATEGORIES, FOREIGN_EDIT, Task, draw_foreign_tasks, draw_tasks
from tests.measure.shapes.stand_in import StandIn, something_else, what_is_asked

COUNT = 12
FIRST_FOREIGN = ("change the cross to white", 1191097751)  # prompt and seed


@pytest.fixture(scope="module")
def tasks() -> list[Task]:
    return draw_tasks(COUNT, seed=5)


@pytest.fixture(scope="module")
def right(tasks: list[Task]) -> list[Drawn]:
    return list(draw_and_judge(StandIn(tasks, what_is_asked), tasks, steps=3))


@pytest.fixture(scope="module")
def wrong(tasks: list[Task]) -> list[Drawn]:
    return list(draw_and_judge(StandIn(tasks, something_else), tasks))


# Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_of_published_examples(right: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(right, n) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


def test_wilson_interval_of_every_small_count() -> None:
    for n in range(1, 30):
        for right in range(n + 1):
            expected = binomtest(right, n).proportion_ci(0.95, method="wilson")
            assert wilson_interval(right, n) == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_tasks_are_the_ruler_and_must_not_change_unnoticed() -> None:
    assert [(task.category, task.prompt, task.seed) for task in draw_tasks(1, seed=0)] == [
        ("held out", "a large purple cross in the top right on a gray background", 0),
        ("single", "a large purple triangle on the right side, red background", 1),
        (
            "two",
            "a small black star at the left and a small orange circle at the top on a blue background",
            2,
        ),
        ("edit", "turn the green ring red", 3),
    ]


def test_foreign_tasks_are_the_ruler_too() -> None:
    (first, second) = draw_foreign_tasks(2, seed=0)
    assert (first.prompt, first.seed) == FIRST_FOREIGN
    assert first.category == second.category == FOREIGN_EDIT
    assert [task.edit.kind for task in (first, second) if task.edit] == ["recolour", "background"]
    assert draw_foreign_tasks(1, seed=0) == [first]
    assert first.reference is not None
    assert first.reference.size == (first.foreign.before.side,) * 2


def test_fewer_tasks_are_the_beginning_of_more(tasks: list[Task]) -> None:
    assert draw_tasks(3, seed=5) == tasks[: 3 * len(CATEGORIES)]
    assert draw_tasks(3, seed=6) != tasks[: 3 * len(CATEGORIES)]


def test_tasks_are_what_their_categories_say() -> None:
    drawn = draw_tasks(60, seed=1)
    assert Counter(task.category for task in drawn) == dict.fromkeys(CATEGORIES, 60)
    assert len({task.seed for task in drawn}) == len(drawn)
    assert Counter(task.edit.kind for task in drawn if task.edit) == dict.fromkeys(EDIT_KINDS, 10)
    for task in drawn:
        assert is_drawable(task.scene)
        shapes = {"held out": (1,), "single": (1,), "two": (2,), "edit": (0, 1, 2)}[task.category]
        assert len(task.scene.shapes) in shapes
        if task.category in ("held out", "single"):
            assert is_held_out(task.scene) == (task.category == "held out")
        if task.edit is not None:
            assert task.scene == task.edit.after
            assert task.prompt == task.edit.instruction


def test_the_right_images_score_all(right: list[Drawn]) -> None:
    assert share_right(right) == 1.0
    assert all(score.right == score.n for score in scores(right))


def test_other_images_score_nothing(wrong: list[Drawn]) -> None:
    assert share_right(wrong) == 0.0
    assert share_right([]) == 0.0
    by_name = {(score.category, score.name): score.right for score in scores(wrong)}
    assert by_name["all", "right"] == by_name["all", "plan"] == 0


def test_images_of_other_tasks_score_next_to_nothing(tasks: list[Task]) -> None:
    """Every category's images handed to its next task: a chance hit is possible, two would be a bug."""
    following = {a.seed: b.scene for a, b in zip(tasks, [*tasks[4:], *tasks[:4]], strict=True)}
    shuffled = draw_and_judge(StandIn(tasks, lambda task: following[task.seed]), tasks)
    assert sum(one.verdict.right for one in shuffled) <= 1


def test_foreign_edits_are_counted_apart(right: list[Drawn]) -> None:
    foreign = draw_foreign_tasks(COUNT, seed=5)
    for answer, expected in ((what_is_asked, COUNT), (something_else, 0)):
        drawn = list(draw_and_judge(StandIn(foreign, answer), foreign))
        found = {(score.category, score.name): score for score in scores([*right, *drawn])}
        assert found[FOREIGN_EDIT, "right"] == Score(FOREIGN_EDIT, "right", expected, COUNT)
        assert found["foreign edit: move", "right"].n == 2
        assert found["all", "right"] == Score("all", "right", 4 * COUNT, 4 * COUNT)
        assert (FOREIGN_EDIT, "unchanged") not in found
        assert frames(sheets.contact_sheet(drawn)) == COUNT - expected


def test_options_reach_the_model(tasks: list[Task]) -> None:
    model = StandIn(tasks, what_is_asked)
    list(draw_and_judge(model, tasks, steps=3, top_k=1))
    assert model.calls == [{"steps": 3, "top_k": 1}] * len(tasks)


def test_counting_by_category_and_property(tasks: list[Task]) -> None:
    """A model that paints single shapes in another colour is wrong there, in that, and nowhere else."""

    def repainted(task: Task) -> Scene:
        if task.category != "single":
            return task.scene
        shape = task.scene.shapes[0]
        colour = next(c for c in ("red", "blue", "green") if c not in (shape.colour, task.scene.background))
        return task.scene.with_shape(0, dataclasses.replace(shape, colour=colour))

    drawn = list(draw_and_judge(StandIn(tasks, repainted), tasks))
    found = {(score.category, score.name): score for score in scores(drawn)}
    assert found["single", "right"] == Score("single", "right", 0, COUNT)
    assert found["all", "right"] == Score("all", "right", 3 * COUNT, 4 * COUNT)
    assert found["single", "colour"].right == found["single", "plan"].right == 0
    assert found["single", "kind"].right == found["held out", "colour"].right == COUNT
    assert found["edit: move", "right"] == Score("edit: move", "right", 2, 2)
    assert found["all", "unchanged"].n == COUNT  # asked of edits alone
    printed = [" ".join(line.split()) for line in table(drawn).splitlines()]
    assert "single 12 0.0% 0.0 to 24.2%" in printed
    assert "colour 48 75.0% 61.2 to 85.1%" in printed


def test_an_image_that_fails_is_wrong_and_shown_so(tasks: list[Task]) -> None:
    class Failing(StandIn):
        def generate(self, prompt: str, *, seed: int, **options: object) -> list:
            if seed == tasks[0].seed:
                raise GenerationError("logits are not finite")
            return super().generate(prompt, seed=seed, **options)

    drawn = list(draw_and_judge(Failing(tasks, what_is_asked), tasks[:4]))
    assert [one.verdict.right for one in drawn] == [False, True, True, True]
    assert drawn[0].image is None
    assert not any(drawn[0].properties.values())
    assert frames(sheets.contact_sheet(drawn)) == 1


def test_models_of_something_else_are_refused(tasks: list[Task]) -> None:
    model = StandIn(tasks, what_is_asked)
    check_model(model)
    model.config.image_tokens.num_image_tokens = 100
    with pytest.raises(ParameterError, match=r"100 image tokens: accepted is .* at least 105"):
        check_model(model)
    model.config.image_size = 1024
    with pytest.raises(ParameterError, match="draws 1024 px images of 64 tokens: accepted is a model of"):
        check_model(model)


def frames(sheet: object) -> int:
    """How many red frames a contact sheet shows: runs of the frame's colour as long as a frame's side."""
    pixels = np.asarray(sheet)
    red = (pixels == np.array(sheets.WRONG)).all(-1).astype(int)
    runs = np.lib.stride_tricks.sliding_window_view(red, sheets.FRAMED, axis=1).sum(-1) == sheets.FRAMED
    return int(runs.sum()) // (2 * sheets.FRAME)


def test_contact_sheet_frames_what_is_wrong_and_only_that(right: list[Drawn], wrong: list[Drawn]) -> None:
    assert frames(sheets.contact_sheet(right)) == 0
    assert frames(sheets.contact_sheet(wrong)) == len(wrong)
    mixed = [*right[:20], *wrong[20:]]
    assert frames(sheets.contact_sheet(mixed)) == len(wrong) - 20


def test_contact_sheet_shows_every_image(right: list[Drawn]) -> None:
    """Each image at twice its size, an edit's beside the one before; text stands between them."""
    sheet = sheets.contact_sheet(right)
    pixels = np.asarray(sheet)
    shown = np.lib.stride_tricks.sliding_window_view(pixels, (sheets.SIDE, sheets.SIDE), axis=(0, 1))
    for one in right[:4]:
        images = [one.image] if one.task.edit is None else [render(one.task.edit.before), one.image]
        for image in images:
            large = np.asarray(image.resize((sheets.SIDE, sheets.SIDE), 0)).transpose(2, 0, 1)
            corners = (pixels[: shown.shape[0], : shown.shape[1]] == large[:, 0, 0]).all(-1)
            assert any((shown[y, x] == large).all() for y, x in np.argwhere(corners)), one.task
    assert sheet.width < 1500


def test_contact_sheet_says_the_given_words_of_a_category(right: list[Drawn]) -> None:
    """In the heading, and nowhere else."""
    two = [one for one in right if one.task.category == "two"]
    usual, other = (
        np.asarray(sheets.contact_sheet(two, words)) for words in (sheets.DESCRIPTIONS, {"two": "x"})
    )
    heading = sheets.MARGIN + sheets.HEADING
    assert (np.asarray(sheets.contact_sheet(two)) == usual).all()
    assert (usual[:heading] != other[:heading]).any()
    assert (usual[heading:] == other[heading:]).all()


def test_contact_sheet_of_one_image(right: list[Drawn]) -> None:
    assert sheets.contact_sheet(right[:1]).width < 400
