"""The strip of images that the README shows."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from PIL import Image

from blip3o_rt.metadata import image_fields, save_png
from examples.shapes import demo_image


def test_images_stand_side_by_side_over_their_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / "red.png", tmp_path / "blue.png"]
    for path in paths:
        save_png(Image.new("RGB", (64, 64), path.stem), path, image_fields("a plain background", 1, {}))
    out = tmp_path / "new" / "demo.png"
    monkeypatch.setattr(sys, "argv", ["demo_image", *map(str, paths), "--out", str(out)])
    demo_image.main()
    sheet = Image.open(out)
    middle = demo_image.MARGIN + demo_image.SIDE // 2
    assert sheet.getpixel((middle, middle)) == (255, 0, 0)
    assert sheet.getpixel((middle + demo_image.SIDE + demo_image.MARGIN, middle)) == (0, 0, 255)
    under = sheet.crop((0, demo_image.SIDE + 2 * demo_image.MARGIN, *sheet.size))
    assert under.convert("L").getextrema()[0] < 128  # words
