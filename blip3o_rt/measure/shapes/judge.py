"""Reads a scene back from an image's pixels, and judges images against the scenes they should show."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import numpy as np
from PIL import Image

from blip3o_rt.measure.shapes.edits import Edit
from blip3o_rt.measure.shapes.render import coverage, render
from blip3o_rt.measure.shapes.scene import (
    HALF_EXTENT,
    IMAGE_SIZE,
    KINDS,
    PALETTE,
    PLACES,
    SIZES,
    Scene,
    Shape,
)

FOREGROUND_DISTANCE = (
    0.2  # RGB distance (channels 0 to 1) from the background; the palette's closest pair is at 0.38
)
SMALLEST_AREA = 14  # pixels; the smallest drawn shape has over 50
SMALLEST_CORE = 6  # pixels inside a patch of a second colour that make it a second shape, not an edge
LOWEST_IOU = 0.6  # of the best template, under which a region is no known shape
PLACE_TOLERANCE = 5.0  # pixels between a region's centre and its place
UNCHANGED_TOLERANCE = 0.05  # mean absolute difference (channels 0 to 1) over pixels an edit should not touch
WINDOW = 34  # pixels, side of the square in which templates are compared


@dataclass(frozen=True)
class Region:
    """A shape as seen: any property that cannot be told is "unknown"."""

    colour: str
    kind: str
    size: str
    place: str
    centre: tuple[float, float]
    iou: float

    def properties(self) -> dict[str, str]:
        return {"colour": self.colour, "kind": self.kind, "size": self.size, "place": self.place}


@dataclass(frozen=True)
class Seen:
    """What an image shows."""

    background: str
    regions: tuple[Region, ...]


@dataclass(frozen=True)
class Verdict:
    """Which properties of an image are right; `right` is all of them together."""

    background: bool
    count: bool
    colour: bool
    kind: bool
    size: bool
    place: bool
    unchanged: bool = True

    @property
    def right(self) -> bool:
        return all(vars(self).values())


def _nearest_palette(pixels: np.ndarray) -> np.ndarray:
    """Index of the nearest palette colour of each pixel [..., 3] in [0, 1]."""
    palette = np.array(list(PALETTE.values()), dtype=np.float32) / 255
    return np.square(pixels[..., None, :] - palette).sum(-1).argmin(-1)


def components(mask: np.ndarray) -> list[np.ndarray]:
    """8-connected components of a mask, as masks, largest first."""
    height, width = mask.shape
    left = mask.copy()
    found = []
    for start in zip(*np.nonzero(mask), strict=True):
        if not left[start]:
            continue
        component = np.zeros_like(mask)
        left[start], component[start] = False, True
        stack = [start]
        while stack:
            row, column = stack.pop()
            for r in range(max(0, row - 1), min(height, row + 2)):
                for c in range(max(0, column - 1), min(width, column + 2)):
                    if left[r, c]:
                        left[r, c], component[r, c] = False, True
                        stack.append((r, c))
        found.append(component)
    return sorted(found, key=lambda component: -int(component.sum()))


def grown(mask: np.ndarray) -> np.ndarray:
    """The mask and its 8-neighbours."""
    padded = np.pad(mask, 1)
    height, width = mask.shape
    return np.logical_or.reduce([padded[r : r + height, c : c + width] for r in range(3) for c in range(3)])


def core(mask: np.ndarray) -> np.ndarray:
    """Pixels whose four neighbours are in the mask too (outside the image counts as in)."""
    padded = np.pad(mask, 1, constant_values=True)
    return mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]


def split_by_colour(component: np.ndarray, labels: np.ndarray) -> list[np.ndarray]:
    """One mask per colour with inner pixels of its own: touching shapes are two, an edge is none."""
    colours, counts = np.unique(labels[component], return_counts=True)
    parts = [component & (labels == c) for c, n in zip(colours, counts, strict=True) if n >= SMALLEST_AREA]
    solid = [part for part in parts if core(part).sum() >= SMALLEST_CORE]
    return solid if len(solid) > 1 else [component]


def parts_of(foreground: np.ndarray, labels: np.ndarray) -> list[np.ndarray]:
    """What stands before the background, as masks of one colour each; specks are left out."""
    large = [mask for mask in components(foreground) if mask.sum() >= SMALLEST_AREA]
    return [part for mask in large for part in split_by_colour(mask, labels)]


@functools.cache
def _templates() -> list[tuple[str, str, tuple[float, float], np.ndarray]]:
    """(kind, size, sub-pixel offset, coverage [WINDOW, WINDOW]) of every shape around the window's middle."""
    first = (IMAGE_SIZE - WINDOW) // 2
    window = slice(first, first + WINDOW)
    middle = IMAGE_SIZE / 2
    return [
        (kind, size, (dx, dy), coverage(kind, HALF_EXTENT[size], middle + dx, middle + dy)[window, window])
        for kind, size, dx, dy in itertools.product(KINDS, SIZES, (0.0, 0.5), (0.0, 0.5))
    ]


def _fit_template(alpha: np.ndarray) -> tuple[str, str, tuple[float, float], float]:
    """(kind, size, centre, soft IoU) of the template that agrees best with a region's coverage [H, W]."""
    rows, columns = np.nonzero(alpha >= min(0.3, float(alpha.max())))
    top, bottom, left, right = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
    middle_y, middle_x = (int(top) + int(bottom)) // 2, (int(left) + int(right)) // 2
    padded = np.pad(alpha, WINDOW)
    best = ("unknown", "unknown", (middle_x + 0.5, middle_y + 0.5), 0.0)
    for dy, dx in itertools.product((-2, -1, 0, 1), repeat=2):
        y, x = middle_y + dy, middle_x + dx
        view = padded[y + WINDOW // 2 : y + WINDOW // 2 + WINDOW, x + WINDOW // 2 : x + WINDOW // 2 + WINDOW]
        for kind, size, (offset_x, offset_y), template in _templates():
            iou = float(np.minimum(view, template).sum() / np.maximum(view, template).sum())
            if iou > best[3]:
                best = (kind, size, (x + offset_x, y + offset_y), iou)
    return best


def _place(x: float, y: float) -> str:
    """The named place nearest a centre, or "unknown" where none is near."""
    centres = {place: Shape("red", "circle", "small", place).centre for place in PLACES}
    place = min(centres, key=lambda p: max(abs(centres[p][0] - x), abs(centres[p][1] - y)))
    distance = max(abs(centres[place][0] - x), abs(centres[place][1] - y))
    return place if distance <= PLACE_TOLERANCE else "unknown"


def _describe(part: np.ndarray, pixels: np.ndarray, labels: np.ndarray, behind: np.ndarray) -> Region:
    """What one region of the image is."""
    inner = core(part)
    chosen = labels[inner] if inner.sum() >= SMALLEST_CORE else labels[part]
    label = int(np.bincount(chosen).argmax())
    colour = np.array(list(PALETTE.values())[label], dtype=np.float32) / 255
    direction = colour - behind
    alpha = ((pixels - behind) @ direction / max(float(direction @ direction), 1e-6)).clip(0, 1)
    kind, size, centre, iou = _fit_template(np.where(grown(part), alpha, 0.0))
    if iou < LOWEST_IOU:
        kind = size = "unknown"
    return Region(list(PALETTE)[label], kind, size, _place(*centre), centre, round(iou, 3))


def read_image(image: Image.Image) -> Seen:
    """What an image of IMAGE_SIZE pixels per side shows, told from its pixels alone."""
    if image.size != (IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(
            f"the image is {image.width} x {image.height} pixels; accepted is {IMAGE_SIZE} x {IMAGE_SIZE}"
        )
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    labels = _nearest_palette(pixels)
    label = int(np.bincount(labels.ravel()).argmax())
    behind = np.median(pixels[labels == label], axis=0)
    foreground = np.linalg.norm(pixels - behind, axis=-1) > FOREGROUND_DISTANCE
    regions = (_describe(part, pixels, labels, behind) for part in parts_of(foreground, labels))
    return Seen(list(PALETTE)[label], tuple(regions))


def judge(seen: Seen, scene: Scene) -> Verdict:
    """Compares what an image shows with a scene, pairing shapes so that the most properties agree."""
    best: dict[str, bool] = {}
    names = ("colour", "kind", "size", "place")
    for order in itertools.permutations(seen.regions[:4], min(len(scene.shapes), len(seen.regions))):
        pairs = list(zip(scene.shapes, order, strict=False))
        right = {name: all(getattr(s, name) == getattr(r, name) for s, r in pairs) for name in names}
        if not best or sum(right.values()) > sum(best.values()):
            best = right
    count = len(seen.regions) == len(scene.shapes)
    agreed = {name: best.get(name, False) and len(seen.regions) >= len(scene.shapes) for name in names}
    return Verdict(background=seen.background == scene.background, count=count, **agreed)


def judge_edit(image: Image.Image, reference: Image.Image, edit: Edit) -> Verdict:
    """Judges an edit by the scene after it, and by the pixels that it should not touch."""
    before, after, got, was = (
        np.asarray(shown.convert("RGB"), dtype=np.float32) / 255
        for shown in (render(edit.before), render(edit.after), image, reference)
    )
    touched = grown(np.abs(before - after).max(axis=-1) > 0.02)
    difference = np.abs(got - was).mean(axis=-1)[~touched]
    verdict = judge(read_image(image), edit.after)
    unchanged = difference.size == 0 or float(difference.mean()) <= UNCHANGED_TOLERANCE
    return Verdict(**{**vars(verdict), "unchanged": unchanged})
