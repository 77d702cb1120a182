"""Judges edits of images that somebody else drew, by hue and outline.

A region's color is the name of its hue, whatever its shade. Its kind is that of the outline that overlaps it
best once both are brought to one center and one area: place, size and angle do not matter to it.
"""

from __future__ import annotations

import colorsys
import functools
import itertools
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from blip3o_rt.measure.shapes.foreign import RING_HOLE, ForeignEdit, Mark, Sketch
from blip3o_rt.measure.shapes.judge import Verdict, core, grown, parts_of
from blip3o_rt.measure.shapes.scene import IMAGE_SIZE, KINDS

FOREGROUND_DISTANCE = 0.2  # RGB distance (channels 0 to 1) from the background
HUE_ENDS = (
    (14, "red"),
    (43, "orange"),
    (70, "yellow"),
    (172, "green"),
    (256, "blue"),
    (328, "purple"),
)  # degrees
LOWEST_SATURATION = 0.25  # under which a color is white, gray or black
BLACK_VALUE, WHITE_VALUE = 0.2, 0.8
WINDOW = 48  # pixels, side of the square in which outlines are compared
WINDOW_PER_SIDE = 2.2  # the window's side over the square root of the region's area
ANGLE_STEP = 6.0  # degrees
SYMMETRY = {
    "square": 90,
    "cross": 90,
    "triangle": 120,
    "star": 72,
}  # degrees after which a kind looks the same
LOWEST_OVERLAP = 0.62  # IoU under which an outline is of no known kind
PLACE_TOLERANCE = 5.0  # pixels, as in the own world
SIZE_TOLERANCE = 1.3  # ratio of lengths either way; the two named sizes are 1.57 apart


@dataclass(frozen=True)
class Outline:
    """A region as seen; its size is the square root of its area, in pixels."""

    colour: str
    kind: str
    center: tuple[float, float]
    size: float
    overlap: float


def hue_name(rgb: np.ndarray) -> str:
    """The name of a color [3] in [0, 1], by its hue."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(float(channel) for channel in rgb))
    if value < BLACK_VALUE:
        return "black"
    if saturation < LOWEST_SATURATION:
        return "white" if value > WHITE_VALUE else "gray"
    return next((name for end, name in HUE_ENDS if hue * 360 < end), "red")


@functools.cache
def _outlines() -> list[tuple[str, np.ndarray]]:
    """(kind, coverage [WINDOW, WINDOW]) of every kind at every angle, brought to one center and one area."""
    found = []
    for kind in KINDS:
        for angle in np.arange(0, SYMMETRY.get(kind, ANGLE_STEP), ANGLE_STEP):
            mark = Mark("white", "white", kind, (IMAGE_SIZE / 2, IMAGE_SIZE / 2), IMAGE_SIZE / 4, angle)
            drawn = Sketch("black", "black", (mark,)).draw()
            found.append((kind, normalized(np.asarray(drawn)[..., 0].astype(np.float32) / 255)[0]))
    return found


def normalized(alpha: np.ndarray) -> tuple[np.ndarray, tuple[float, float], float]:
    """A region's coverage [H, W] in a window of its own [WINDOW, WINDOW], its center and its size."""
    area = float(alpha.sum())
    rows, columns = np.indices(alpha.shape) + 0.5
    x, y = float((alpha * columns).sum() / area), float((alpha * rows).sum() / area)
    reach = math.sqrt(area) * WINDOW_PER_SIDE / 2
    window = Image.fromarray(alpha.astype(np.float32)).transform(
        (WINDOW, WINDOW),
        Image.Transform.EXTENT,
        (x - reach, y - reach, x + reach, y + reach),
        Image.Resampling.BILINEAR,
    )
    return np.asarray(window), (x, y), math.sqrt(area)


def _describe(part: np.ndarray, pixels: np.ndarray, behind: np.ndarray) -> Outline:
    """What one region of an image is; behind is the background's color [3]."""
    inner = core(part) if core(part).any() else part
    color = np.median(pixels[inner], axis=0)
    direction = color - behind
    alpha = ((pixels - behind) @ direction / max(float(direction @ direction), 1e-6)).clip(0, 1)
    window, center, size = normalized(np.where(grown(part), alpha, 0.0))
    overlaps = [
        (float(np.minimum(window, outline).sum() / np.maximum(window, outline).sum()), kind)
        for kind, outline in _outlines()
    ]
    overlap, kind = max(overlaps)
    if overlap < LOWEST_OVERLAP:
        kind = "unknown"
    return Outline(hue_name(color), kind, center, size, round(overlap, 3))


def read_outlines(image: Image.Image) -> tuple[str, list[Outline]]:
    """The name of an image's background and the outlines before it, told from its pixels alone."""
    small = image.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)
    pixels = np.asarray(small, dtype=np.float32) / 255
    rim = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    behind = np.median(rim, axis=0)
    names = sorted({name for _, name in HUE_ENDS} | {"white", "gray", "black"})
    labels = np.array([[names.index(hue_name(pixel)) for pixel in row] for row in pixels])
    foreground = np.linalg.norm(pixels - behind, axis=-1) > FOREGROUND_DISTANCE
    return hue_name(behind), [_describe(part, pixels, behind) for part in parts_of(foreground, labels)]


def mark_size(mark: Mark) -> float:
    """The square root of a mark's area, in pixels."""
    corners = mark.outline()
    area = (
        abs(sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in itertools.pairwise([*corners, corners[0]]))) / 2
    )
    if mark.kind == "ring":
        area *= 1 - RING_HOLE**2
    return mark.half_extent * math.sqrt(area)


def centroid(mark: Mark) -> tuple[float, float]:
    """The center of a mark's area, which for a triangle lies under the middle of its box."""
    corners = mark.outline()
    x, y = (sum(values) / len(corners) for values in zip(*corners, strict=True))
    return mark.center[0] + mark.half_extent * x, mark.center[1] + mark.half_extent * y


def _agreement(outline: Outline, mark: Mark) -> dict[str, bool]:
    apart = max(abs(a - b) for a, b in zip(outline.center, centroid(mark), strict=True))
    ratio = outline.size / mark_size(mark)
    return {
        "colour": outline.colour == mark.colour,
        "kind": outline.kind == mark.kind,
        "size": 1 / SIZE_TOLERANCE <= ratio <= SIZE_TOLERANCE,
        "place": apart <= PLACE_TOLERANCE,
    }


def judge_foreign_edit(image: Image.Image, edit: ForeignEdit) -> Verdict:
    """Compares what an image shows with what should be seen after an edit of somebody's image."""
    background, outlines = read_outlines(image)
    marks = edit.after.marks
    best: dict[str, bool] = {}
    for order in itertools.permutations(outlines[:4], min(len(marks), len(outlines))):
        pairs = [_agreement(outline, mark) for outline, mark in zip(order, marks, strict=False)]
        right = {name: all(p[name] for p in pairs) for name in ("colour", "kind", "size", "place")}
        if not best or sum(right.values()) > sum(best.values()):
            best = right
    enough = len(outlines) >= len(marks)
    return Verdict(
        background=background == edit.after.background,
        count=len(outlines) == len(marks),
        **{name: enough and right for name, right in best.items()},
    )
