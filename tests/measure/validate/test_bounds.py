"""Bounds of stages, choices near ties, and the likeness of images."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from blip3o_rt.measure.validate.bounds import BF16_RATIO, FP32_BOUND, equal_line, tensor_line
from blip3o_rt.measure.validate.choices import choice_line
from blip3o_rt.measure.validate.dit import _latents_line
from blip3o_rt.measure.validate.images import AMPLIFIED, ImageFiles, Likeness, image_lines
from blip3o_rt.measure.validate.line import at_least, at_most
from blip3o_rt.measure.validate.table import figure, row

EXACT = torch.full((4, 5), 2.0)


def test_fp32_is_held_to_one_bound() -> None:
    assert tensor_line("ar", "x", "fp32", EXACT * (1 + 0.5 * FP32_BOUND), EXACT, None).passed
    line = tensor_line("ar", "x", "fp32", EXACT * (1 + 2 * FP32_BOUND), EXACT, None)
    assert not line.passed
    assert line.reference_error is None


def test_bf16_is_held_to_the_published_error() -> None:
    published = EXACT * 1.01
    line = tensor_line("ar", "x", "bf16", EXACT * (1 - 0.01 * BF16_RATIO * 0.99), EXACT, published)
    assert line.passed
    assert line.reference_error == pytest.approx(0.01, rel=1e-4)
    assert line.bound == pytest.approx(0.01 * BF16_RATIO, rel=1e-4)
    assert not tensor_line("ar", "x", "bf16", EXACT * (1 + 0.0101 * BF16_RATIO), EXACT, published).passed


def test_another_shape_or_no_number_fails() -> None:
    assert not tensor_line("ar", "x", "fp32", EXACT[:1], EXACT, None).passed
    assert not tensor_line("ar", "x", "fp32", EXACT * math.nan, EXACT, None).passed
    assert not equal_line("ar", "x", "fp32", EXACT[:1], EXACT, why="").passed


@pytest.mark.parametrize("step", [0, 1, 2])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_latents_without_a_number_fail_at_whichever_step(step: int, dtype: str) -> None:
    found = [EXACT.clone() for _ in range(3)]
    published = [EXACT * 1.01] * 3 if dtype == "bf16" else None
    assert _latents_line("text", dtype, found, [EXACT] * 3, published).passed
    found[step][0, 0] = math.nan
    line = _latents_line("text", dtype, found, [EXACT] * 3, published)
    assert not line.passed
    assert (line.detail or "").startswith(f"worst of 3 steps: {step + 1}; each: ")


def test_equal_counts_what_differs() -> None:
    other = EXACT.clone()
    other[0, 0] = 1
    line = equal_line("ar", "x", "fp32", other, EXACT, why="")
    assert (line.passed, line.found) == (False, 1)


@pytest.mark.parametrize(
    ("gap", "scores_off_by", "passes"),
    [(0.0, 0.0, True), (1e-6, None, True), (1e-3, None, False), (0.2, 0.1, True), (0.3, 0.1, False)],
)
def test_choices_within_rounding_of_the_best_are_right(
    gap: float, scores_off_by: float | None, passes: bool
) -> None:
    """A choice may be off by twice what a score is off by: its own and the best one's."""
    scores = torch.tensor([[0.0, 1.0, 1.0 - gap]])
    published = None
    if scores_off_by is not None:
        published = scores + torch.tensor([[0.0, -scores_off_by, 0.0]])
    line = choice_line("ar", "tokens", "bf16", torch.tensor([2]), scores, published, "token")
    assert line.passed == passes
    assert "of 1 are the published tokens" in (line.detail or "")
    if not passes:
        assert "the first wrong one is 0" in (line.detail or "")


def test_choices_out_of_range_fail() -> None:
    for chosen in (torch.tensor([3]), torch.tensor([-1]), torch.tensor([0, 0])):
        assert not choice_line("ar", "tokens", "fp32", chosen, torch.zeros(1, 3), None, "token").passed


def test_likeness_by_hand() -> None:
    image = np.random.default_rng(0).integers(0, 250, (32, 32, 3), dtype=np.uint8)
    same = Likeness.of(image, image)
    assert (same.psnr, same.ssim, same.off_by_more) == (math.inf, pytest.approx(1.0), 0.0)
    one = Likeness.of(image + 1, image)
    assert one.psnr == pytest.approx(20 * math.log10(255))
    assert one.off_by_more == 0
    assert Likeness.of(image + 2, image).off_by_more == 1
    assert Likeness.of(255 - image, image).ssim < 0


def test_one_value_of_an_fp32_image_off_by_two_fails() -> None:
    image = np.full((64, 64, 3), 100, dtype=np.uint8)
    found = image.copy()
    found[0, 0, 0] = 102
    levels = next(image_lines("vae", "decode", "fp32", Likeness.of(found, image), None))
    assert not levels.passed


@pytest.mark.parametrize(("off_by", "passes"), [(0, True), (1, True), (2, False)])
def test_fp32_images_are_within_one_grey_level(off_by: int, passes: bool) -> None:
    image = np.random.default_rng(0).integers(0, 250, (32, 32, 3), dtype=np.uint8)
    found = Likeness.of(image + np.uint8(off_by), image)
    lines = list(image_lines("vae", "decode", "fp32", found, None))
    assert [line.measure for line in lines] == ["share off by more than one", "PSNR dB", "SSIM"]
    assert all(line.passed for line in lines) == passes
    for line in lines:
        json.dumps(line.to_dict(), allow_nan=False)


def test_bf16_images_are_held_to_the_published_one() -> None:
    yardstick = Likeness(psnr=40.0, ssim=0.99, off_by_more=0.5)
    for psnr, ssim, passes in ((38.2, 0.985, [True, True]), (38.0, 0.984, [False, False])):
        lines = list(image_lines("vae", "decode", "bf16", Likeness(psnr, ssim, 0.5), yardstick))
        assert [line.passed for line in lines] == passes
        assert [line.reference_error for line in lines] == [40.0, 0.99]


def test_image_files(tmp_path: Path) -> None:
    files = ImageFiles(tmp_path)
    image = np.full((16, 16, 3), 10, dtype=np.uint8)
    expected = image.copy()
    expected[0, 0], expected[0, 1] = 13, 255
    files("vae decode fp32", image, expected)
    (entry,) = files.entries
    assert set(entry) == {"name", "ours", "reference", "difference", "psnr", "ssim", "amplified"}
    difference = np.asarray(Image.open(tmp_path / entry["difference"]))
    assert difference[0, 0, 0] == 3 * AMPLIFIED
    assert difference[0, 1, 0] == 255
    assert difference[1:].max() == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / entry["ours"])), image)
    files("equal", image, image)
    assert files.entries[1]["psnr"] is None


def test_rows_say_which_way_the_bound_goes() -> None:
    error = at_most("vae", "decode", "fp32", "relative L2", 2e-6, 1e-5, why="rounding", detail="more")
    assert row(error).startswith("ok   vae")
    assert "2.0e-06 <= 1.0e-05" in row(error)
    assert "more" not in row(error)
    likeness = at_least("vae", "decode", "bf16", "PSNR dB", 30.0, 40.0, why="w", detail="more")
    assert row(likeness).startswith("FAIL vae")
    assert "30 >= 40" in row(likeness)
    assert row(likeness).endswith("\n     more")


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "none"), (math.nan, "none"), (0.0, "0"), (12.0, "12"), (1e-7, "1.0e-07"), (48.13, "48.13")],
)
def test_figures(value: float | None, text: str) -> None:
    assert figure(value) == text
