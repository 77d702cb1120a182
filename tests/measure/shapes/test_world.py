"""The shapes world: scenes, words, codes and the pixel scorer against exact renders."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from blip3o_rt.measure.shapes import captions, codes, edits, judge, render, scene
from blip3o_rt.measure.shapes.scene import HELD_OUT, PLACES, Scene, Shape
from examples.shapes.image_tokenizer import code_properties

IMAGES = 120


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    rng = random.Random(2)
    return [scene.random_scene(rng) for _ in range(IMAGES)]


def test_scorer_reads_every_exact_render(scenes: list[Scene]) -> None:
    verdicts = [judge.judge(judge.read_image(render.render(s)), s) for s in scenes]
    assert all(verdict.right for verdict in verdicts)


def test_scorer_reads_every_kind_size_and_place() -> None:
    for index, place in enumerate(PLACES):
        for kind in scene.KINDS:
            for size in scene.SIZES:
                colour = scene.COLOURS[index % len(scene.COLOURS)]
                drawn = Scene("gray", (Shape(colour, kind, size, place),))
                seen = judge.read_image(render.render(drawn))
                assert judge.judge(seen, drawn).right, (drawn, seen)


def test_scorer_rejects_shuffled_pairs() -> None:
    rng = random.Random(3)
    drawn = [scene.random_scene(rng, shapes=rng.choice((1, 2))) for _ in range(IMAGES)]
    right = [
        judge.judge(judge.read_image(render.render(shown)), asked).right
        for shown, asked in zip(drawn, [*drawn[1:], drawn[0]], strict=True)
    ]
    assert sum(right) <= 0.02 * IMAGES


@pytest.mark.parametrize("name", ["colour", "kind", "size", "place"])
def test_one_wrong_property_is_the_one_reported(name: str) -> None:
    asked = Shape("red", "circle", "large", "left")
    wrong = {"colour": "blue", "kind": "square", "size": "small", "place": "top"}
    shown = Shape(**{**vars(asked), name: wrong[name]})
    verdict = judge.judge(judge.read_image(render.render(Scene("white", (shown,)))), Scene("white", (asked,)))
    assert not verdict.right
    assert [key for key, good in vars(verdict).items() if not good] == [name]


def test_scorer_counts_shapes_and_names_the_background() -> None:
    one = Scene("yellow", (Shape("red", "star", "large", "centre"),))
    two = Scene("yellow", (*one.shapes, Shape("blue", "ring", "small", "top left")))
    assert not judge.judge(judge.read_image(render.render(two)), one).count
    assert not judge.judge(judge.read_image(render.render(one)), two).right
    assert not judge.judge(judge.read_image(render.render(one)), Scene("gray", one.shapes)).background


def test_scorer_forgives_blur_and_noise(scenes: list[Scene]) -> None:
    """Mild blur and noise of three grey levels leave what a person sees: 95% must still be read."""
    noise = np.random.default_rng(0)
    right = 0
    for drawn in scenes:
        blurred = render.render(drawn).filter(ImageFilter.GaussianBlur(0.6))
        pixels = np.asarray(blurred).astype(np.int16) + noise.normal(0, 3, (64, 64, 3)).round().astype(
            np.int16
        )
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8), "RGB")
        right += judge.judge(judge.read_image(image), drawn).right
    assert right >= 0.95 * len(scenes)


def test_scorer_refuses_an_image_of_another_size() -> None:
    with pytest.raises(ValueError, match="accepted is 64 x 64"):
        judge.read_image(Image.new("RGB", (32, 32)))


@pytest.mark.parametrize("seed", range(3))
def test_scorer_reads_any_image(seed: int) -> None:
    """Noise, coarse blotches and faint smudges are no scene, and no reason to fail."""
    rng = np.random.default_rng(seed)
    blotches = Image.fromarray(rng.integers(0, 256, (7, 7, 3), dtype=np.uint8), "RGB")
    smudges = 128 + rng.normal(0, 40, (64, 64, 3)) * (rng.random((64, 64, 1)) < 0.1)
    asked = Scene("gray", (Shape("red", "circle", "large", "left"),))
    for image in (blotches.resize((64, 64)), Image.fromarray(smudges.clip(0, 255).astype(np.uint8), "RGB")):
        assert not judge.judge(judge.read_image(image), asked).right


def test_edits_are_judged_by_the_scene_after_and_by_untouched_pixels() -> None:
    rng = random.Random(4)
    for kind in edits.EDIT_KINDS:
        edit = edits.random_edit(rng, kind)
        before, after = render.render(edit.before), render.render(edit.after)
        assert judge.judge_edit(after, before, edit).right
        if kind != "keep":
            assert not judge.judge_edit(before, before, edit).right
    shown = Scene("white", (Shape("red", "circle", "large", "left"),))
    keep = edits.Edit("keep", "keep the image unchanged", shown, shown)
    tinted = Image.blend(render.render(shown), Image.new("RGB", (64, 64), (128, 128, 128)), 0.15)
    assert judge.judge(judge.read_image(tinted), shown).right
    assert not judge.judge_edit(tinted, render.render(shown), keep).unchanged


def test_a_tenth_is_held_out_and_training_never_shows_it() -> None:
    every = [(c, k, b) for c in scene.COLOURS for k in scene.KINDS for b in scene.BACKGROUNDS if c != b]
    assert len(HELD_OUT) == round(len(every) / 10)
    assert all(any((c, k, b) not in HELD_OUT for c, k, b in every if b == name) for name in scene.BACKGROUNDS)
    rng = random.Random(5)
    assert not any(scene.is_held_out(scene.training_scene(rng)) for _ in range(2000))
    trained = [edits.random_edit(rng) for _ in range(500)]
    assert not any(scene.is_held_out(s) for edit in trained for s in (edit.before, edit.after))
    assert all(scene.is_held_out(scene.held_out_scene(rng)) for _ in range(100))


def test_complete_captions_name_everything() -> None:
    rng = random.Random(6)
    sizes = {word for words in captions.SIZE_WORDS.values() for word in words}
    for _ in range(300):
        drawn = scene.random_scene(rng)
        text = captions.caption(drawn, rng, complete=True)
        words = text.replace(",", "").split()
        assert scene.BACKGROUNDS.index(drawn.background) >= 0
        assert drawn.background.replace("gray", "gr") in text
        assert sum(word in sizes for word in words) == len(drawn.shapes)
        for shape in drawn.shapes:
            assert f"{shape.colour} {shape.kind}" in text


def test_edits_change_only_what_they_say() -> None:
    rng = random.Random(7)
    for _ in range(300):
        edit = edits.random_edit(rng, held_out=True)
        assert scene.is_drawable(edit.before)
        assert scene.is_drawable(edit.after)
        kept = set(edit.before.shapes) & set(edit.after.shapes)
        changed = {"keep": 0, "background": 0, "add": 0, "remove": 1, "move": 1, "recolour": 1}[edit.kind]
        assert len(kept) == len(edit.before.shapes) - changed
        assert (edit.before.background == edit.after.background) == (edit.kind != "background")


def test_codes_tell_the_scene(scenes: list[Scene]) -> None:
    for drawn in scenes:
        found = codes.describe_codes(codes.scene_codes(drawn))
        assert found.background == drawn.background
        assert set(found.shapes) == set(drawn.shapes)
    meanings = {codes.code_meaning(code) for code in range(codes.USED_CODES)}
    assert len(meanings) == codes.USED_CODES
    assert len({tuple(row) for row in code_properties()}) == codes.USED_CODES


def test_render_paints_shapes_over_the_background() -> None:
    drawn = Scene("white", (Shape("red", "square", "large", "top left"),))
    images, covered = render.render_batch([drawn])
    red, white = (torch.tensor(scene.PALETTE[name]) / 255 for name in ("red", "white"))
    torch.testing.assert_close(images[0, :, 12, 12], red)  # inside
    torch.testing.assert_close(images[0, :, 40, 40], white)  # outside
    area = float(covered.sum())
    assert area == pytest.approx((2 * 11 * render.SQUARE_HALF_SIDE) ** 2, rel=0.02)  # analytic area
