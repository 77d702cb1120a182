"""One image of many: every drawn image with its prompt and verdict, failures framed and named in red."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

from blip3o_rt.measure.shapes.scene import IMAGE_SIZE
from blip3o_rt.measure.shapes.score import Drawn, wilson_interval
from blip3o_rt.measure.shapes.tasks import CATEGORIES, FOREIGN

FRAME = 3
SIDE = 2 * IMAGE_SIZE  # pixels of an image on the sheet
FRAMED = SIDE + 2 * FRAME
MARGIN = 10
FONT_SIZE, HEADING_SIZE = 11, 16
LINE = FONT_SIZE + 3
TEXT_LINES = 5  # under an edit
CELL_WIDTH = 2 * FRAMED + MARGIN  # an image and its text, or the image before and the one after
HEADING = 2 * HEADING_SIZE
COLUMNS, MANY_COLUMNS, MANY = 5, 12, 160  # from MANY images on, more stand side by side
DESCRIPTIONS = CATEGORIES | FOREIGN
PAPER, INK, RIGHT, WRONG = (255, 255, 255), (40, 40, 40), (20, 120, 50), (200, 0, 30)


def contact_sheet(drawn: Sequence[Drawn], words: Mapping[str, str] = DESCRIPTIONS) -> Image.Image:
    """Every image at twice its size, by category in the order of the tasks, under the category's words."""
    sections = {name: [one for one in drawn if one.task.category == name] for name in words}
    columns = MANY_COLUMNS if len(drawn) >= MANY else COLUMNS
    columns = min(columns, max(1, *map(len, sections.values())))
    heights = {name: _section_height(members, columns) for name, members in sections.items()}
    width = MARGIN + columns * (CELL_WIDTH + MARGIN)
    sheet = Image.new("RGB", (width, MARGIN + sum(heights.values())), PAPER)
    pen = ImageDraw.Draw(sheet)
    top = MARGIN
    for name, members in sections.items():
        if members:
            pen.text((MARGIN, top), _heading(words, members), INK, ImageFont.load_default(HEADING_SIZE))
        for index, one in enumerate(members):
            row, column = divmod(index, columns)
            left = MARGIN + column * (CELL_WIDTH + MARGIN)
            _draw_cell(sheet, pen, one, left, top + HEADING + row * (_cell_height(one) + MARGIN))
        top += heights[name]
    return sheet


def _cell_height(one: Drawn) -> int:
    return FRAMED + (TEXT_LINES * LINE if one.task.edit is not None else 0)


def _section_height(members: Sequence[Drawn], columns: int) -> int:
    rows = -(-len(members) // columns)
    return HEADING + rows * (_cell_height(members[0]) + MARGIN) if members else 0


def _heading(words: Mapping[str, str], members: Sequence[Drawn]) -> str:
    category, right = members[0].task.category, sum(one.verdict.right for one in members)
    low, high = wilson_interval(right, len(members))
    return (
        f"{category}: {right} of {len(members)} right (95% interval {100 * low:.0f} to {100 * high:.0f}%); "
        f"{words[category]}"
    )


def _draw_cell(sheet: Image.Image, pen: ImageDraw.ImageDraw, one: Drawn, left: int, top: int) -> None:
    """The image with its text beside it, or what is edited, the image, and the text under both."""
    reference = one.task.reference
    if reference is None:
        at, text_at, text_width = left, (left + FRAMED + MARGIN, top), FRAMED
    else:
        _paste(sheet, reference, left, top)
        at, text_at, text_width = left + FRAMED + MARGIN, (left, top + FRAMED), CELL_WIDTH
    if not one.verdict.right:
        pen.rectangle((at, top, at + FRAMED - 1, top + FRAMED - 1), outline=WRONG, width=FRAME)
    if one.image is not None:
        _paste(sheet, one.image, at, top)
    font = ImageFont.load_default(FONT_SIZE)
    verdict = wrapped(_verdict_words(one), text_width, font)
    colours = [RIGHT if one.verdict.right else WRONG] * len(verdict)
    x, y = text_at
    for words in [*verdict, *wrapped(one.task.prompt, text_width, font)]:
        pen.text((x, y), words, colours.pop() if colours else INK, font)
        y += LINE


def _paste(sheet: Image.Image, image: Image.Image, left: int, top: int) -> None:
    sheet.paste(image.resize((SIDE, SIDE), Image.Resampling.NEAREST), (left + FRAME, top + FRAME))


def _verdict_words(one: Drawn) -> str:
    if one.image is None:
        return f"FAILED to draw, seed {one.task.seed}:"
    words = "right" if one.verdict.right else f"WRONG {', '.join(one.wrong)}"
    return f"{words}, seed {one.task.seed}:"


def wrapped(text: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> list[str]:
    """The text in lines of at most so many pixels, broken between words."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
