"""The judge of images that somebody else drew: it names hue and outline, and refuses anything else."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from blip3o_rt.measure.shapes.edits import EDIT_KINDS, Edit, random_edit
from blip3o_rt.measure.shapes.foreign import ForeignEdit, Mark, Sketch, foreign_edit
from blip3o_rt.measure.shapes.foreign_judge import hue_name, judge_foreign_edit, read_outlines
from blip3o_rt.measure.shapes.judge import Verdict
from blip3o_rt.measure.shapes.render import render
from blip3o_rt.measure.shapes.scene import KINDS, PALETTE, random_scene
from examples.shapes import foreign as training

EDITS = 60


@pytest.fixture(scope="module")
def edits() -> list[tuple[Edit, ForeignEdit]]:
    rng, kinds = random.Random(1), list(EDIT_KINDS)
    chosen = [random_edit(rng, kinds[index % len(kinds)], held_out=True) for index in range(EDITS)]
    return [(edit, foreign_edit(edit, rng)) for edit in chosen]


def test_what_should_be_seen_is_right(edits: list[tuple[Edit, ForeignEdit]]) -> None:
    """Whether drawn as the image was, or by the own world with its sizes, places and palette."""
    for edit, foreign in edits:
        assert judge_foreign_edit(foreign.after.draw(), foreign).right, foreign
        assert judge_foreign_edit(render(edit.after), foreign).right, foreign


def test_the_image_before_and_other_images_are_wrong(edits: list[tuple[Edit, ForeignEdit]]) -> None:
    for (edit, foreign), (_, other) in zip(edits, [*edits[1:], edits[0]], strict=True):
        assert judge_foreign_edit(foreign.before.draw(), foreign).right == (edit.kind == "keep")
        assert not judge_foreign_edit(other.after.draw(), foreign).right


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("half_extent", [6.5, 8.0, 11.0])
@pytest.mark.parametrize("degrees", [0, 13])
def test_a_kind_drawn_by_other_code_is_that_kind_alone(kind: str, half_extent: float, degrees: int) -> None:
    """Drawn as the training draws it, which shares neither outlines nor code with the judge."""
    figure = training.Figure(kind, (30.0, 27.0), half_extent, np.radians(degrees), (0.8, 0.1, 0.2))
    pixels, _ = training.draw((1.0, 1.0, 1.0), [figure], 64, 8)
    image = Image.fromarray((pixels * 255).round().astype(np.uint8), "RGB")
    for asked in KINDS:
        mark = Mark("red", "red", asked, (30.0, 27.0), half_extent)
        sketch = Sketch("white", "white", (mark,))
        assert judge_foreign_edit(image, ForeignEdit(sketch, sketch)).kind == (asked == kind), asked


def verdict(shown: Mark, asked: Mark, background: str = "white") -> Verdict:
    drawn = Sketch(background, background, (shown,), side=256)
    wanted = Sketch("white", "white", (asked,))
    return judge_foreign_edit(drawn.draw(), ForeignEdit(wanted, wanted))


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("colour", {"css_color": "royalblue"}),
        ("kind", {"kind": "circle"}),
        ("size", {"half_extent": 11.0}),
        ("place", {"center": (40.0, 30.0)}),
    ],
)
def test_one_wrong_property_is_the_one_reported(name: str, other: dict[str, object]) -> None:
    asked = Mark("red", "firebrick", "square", (30.0, 30.0), 7.5, angle=10.0)
    assert verdict(asked, asked).right
    found = verdict(replace(asked, **other), asked)
    assert [key for key, good in vars(found).items() if not good] == [name]


def test_another_background_and_no_shape_are_wrong() -> None:
    asked = Mark("red", "crimson", "ring", (30.0, 30.0), 7.5)
    assert not verdict(asked, asked, background="gold").background
    sketch = Sketch("white", "white", (asked,))
    empty = judge_foreign_edit(Image.new("RGB", (64, 64), "white"), ForeignEdit(sketch, sketch))
    assert empty.background
    assert not any((empty.count, empty.kind, empty.place))


def test_the_own_palette_has_its_names() -> None:
    assert {name: hue_name(np.array(rgb) / 255) for name, rgb in PALETTE.items()} == {n: n for n in PALETTE}


def test_training_references_show_their_scenes() -> None:
    """Read by the judge, which knows nothing of how they were drawn; noise and compression may hide a few."""
    rng = random.Random(3)
    scenes = [random_scene(rng) for _ in range(EDITS)]
    images, covered = training.draw_references(scenes, rng)
    assert images.shape == (EDITS, 3, 64, 64)
    assert covered.shape == (EDITS, 1, 64, 64)
    right = 0
    for scene, image in zip(scenes, images, strict=True):
        pixels = (image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        background, outlines = read_outlines(Image.fromarray(pixels, "RGB"))
        kinds = sorted((shape.colour, shape.kind) for shape in scene.shapes)
        right += background == scene.background and sorted((o.colour, o.kind) for o in outlines) == kinds
    assert right >= 0.75 * EDITS
