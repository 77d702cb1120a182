"""What each image token means: the code of every cell of a scene, and the scene a grid of codes describes.

A cell that a shape's bounding square covers by a quarter or more says (colour, kind, size); every other cell
says the background. Codes factor this way so that a held-out (colour, kind, background) combination has codes
that training knows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from blip3o_rt.measure.shapes.scene import (
    BACKGROUNDS,
    COLOURS,
    IMAGE_SIZE,
    KINDS,
    PLACES,
    SIZES,
    Scene,
    Shape,
)

GRID = 8  # cells per side
TOKENS_PER_IMAGE = GRID * GRID
CELL = IMAGE_SIZE // GRID  # pixels
COVERED_SHARE = 0.25
FIRST_SHAPE_CODE = len(BACKGROUNDS)
USED_CODES = FIRST_SHAPE_CODE + len(COLOURS) * len(KINDS) * len(SIZES)


def shape_code(colour: str, kind: str, size: str) -> int:
    """The code of cells that such a shape covers."""
    return FIRST_SHAPE_CODE + (COLOURS.index(colour) * len(KINDS) + KINDS.index(kind)) * 2 + SIZES.index(size)


def code_meaning(code: int) -> tuple[str, ...]:
    """(background,) or (colour, kind, size) of a code; () for one of the spare codes."""
    if code < FIRST_SHAPE_CODE:
        return (BACKGROUNDS[code],)
    if code >= USED_CODES:
        return ()
    rest, size = divmod(code - FIRST_SHAPE_CODE, 2)
    colour, kind = divmod(rest, len(KINDS))
    return COLOURS[colour], KINDS[kind], SIZES[size]


def _overlap(cell: int, centre: float, half_extent: float) -> float:
    """Share of a cell's side inside [centre - half_extent, centre + half_extent]."""
    first, last = max(cell * CELL, centre - half_extent), min((cell + 1) * CELL, centre + half_extent)
    return max(0.0, last - first) / CELL


def covered_cells(shape: Shape) -> dict[int, float]:
    """Cells (row-major) that the shape's bounding square covers enough, with the share covered."""
    x, y = shape.centre
    shares = {
        row * GRID + column: _overlap(row, y, shape.half_extent) * _overlap(column, x, shape.half_extent)
        for row in range(GRID)
        for column in range(GRID)
    }
    return {cell: share for cell, share in shares.items() if share >= COVERED_SHARE}


def scene_codes(scene: Scene) -> list[int]:
    """The scene's codes in raster order, TOKENS_PER_IMAGE of them."""
    codes = [BACKGROUNDS.index(scene.background)] * TOKENS_PER_IMAGE
    best = [0.0] * TOKENS_PER_IMAGE
    for shape in scene.shapes:
        for cell, share in covered_cells(shape).items():
            if share > best[cell]:
                codes[cell], best[cell] = shape_code(shape.colour, shape.kind, shape.size), share
    return codes


def describe_codes(codes: Sequence[int]) -> Scene:
    """The scene a grid of codes describes: the commonest background, and per shape code the nearest place."""
    backgrounds = Counter(code for code in codes if 0 <= code < FIRST_SHAPE_CODE)
    background = BACKGROUNDS[backgrounds.most_common(1)[0][0]] if backgrounds else "gray"
    shapes = []
    counts = Counter(code for code in codes if FIRST_SHAPE_CODE <= code < USED_CODES)
    for code, count in counts.most_common(2):
        colour, kind, size = code_meaning(code)
        cells = {cell for cell, value in enumerate(codes) if value == code}
        overlaps = {p: len(cells ^ set(covered_cells(Shape(colour, kind, size, p)))) for p in PLACES}
        if count >= 2:
            shapes.append(Shape(colour, kind, size, min(overlaps, key=lambda p: overlaps[p])))
    return Scene(background, tuple(shapes))
