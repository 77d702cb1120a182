"""The picture of pictures for the README."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from PIL import Image

from blip3o_rt.metadata import image_fields, save_png
from examples.shapes import demo_picture


def test_pictures_stand_side_by_side_over_their_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / "red.png", tmp_path / "blue.png"]
    for path in paths:
        save_png(Image.new("RGB", (64, 64), path.stem), path, image_fields("a plain background", 1, {}))
    out = tmp_path / "new" / "demo.png"
    monkeypatch.setattr(sys, "argv", ["demo_picture", *map(str, paths), "--out", str(out)])
    demo_picture.main()
    sheet = Image.open(out)
    middle = demo_picture.MARGIN + demo_picture.SIDE // 2
    assert sheet.getpixel((middle, middle)) == (255, 0, 0)
    assert sheet.getpixel((middle + demo_picture.SIDE + demo_picture.MARGIN, middle)) == (0, 0, 255)
    under = sheet.crop((0, demo_picture.SIDE + 2 * demo_picture.MARGIN, *sheet.size))
    assert under.convert("L").getextrema()[0] < 128  # words
