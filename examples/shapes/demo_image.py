"""Lays images side by side, enlarged, over their prompts (python -m examples.shapes.demo_image)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from blip3o_rt.measure.shapes.contact_sheet import INK, PAPER, wrapped
from blip3o_rt.metadata import read_metadata, save_png

SIDE = 320  # pixels of an image, five times its own
MARGIN = 16
FONT_SIZE = 15
LINE = FONT_SIZE + 5
TEXT_LINES = 3


def side_by_side(images: Sequence[Image.Image], prompts: Sequence[str]) -> Image.Image:
    """One row of images, each over its prompt."""
    size = (MARGIN + len(images) * (SIDE + MARGIN), 2 * MARGIN + SIDE + TEXT_LINES * LINE)
    sheet = Image.new("RGB", size, PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)
    for index, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        left = MARGIN + index * (SIDE + MARGIN)
        sheet.paste(image.resize((SIDE, SIDE), Image.Resampling.NEAREST), (left, MARGIN))
        for number, words in enumerate(wrapped(prompt, SIDE, font)[:TEXT_LINES]):
            pen.text((left, MARGIN + SIDE + 6 + number * LINE), words, INK, font)
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", nargs="+", type=Path, help="PNG files that blip3o-rt wrote")
    parser.add_argument("--out", type=Path, required=True, help="the PNG to write")
    arguments = parser.parse_args()
    prompts = [str(read_metadata(path)["prompt"]) for path in arguments.images]
    images = [Image.open(path).convert("RGB") for path in arguments.images]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    save_png(side_by_side(images, prompts), arguments.out, {})


if __name__ == "__main__":
    main()
