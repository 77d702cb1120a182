"""Images of shapes as somebody else draws them: Pillow's primitives, CSS colors, any size of image.

Nothing here is shared with how the model's own world is drawn or trained but the words for colors, kinds,
sizes and places.
"""

from __future__ import annotations

import io
import math
import random
from dataclasses import dataclass, replace

from PIL import Image, ImageColor, ImageDraw

from blip3o_rt.measure.shapes.edits import Edit
from blip3o_rt.measure.shapes.scene import HALF_EXTENT, IMAGE_SIZE, Scene, Shape

CSS_COLORS = {
    "red": ("red", "crimson", "firebrick"),
    "green": ("green", "forestgreen", "limegreen", "seagreen"),
    "blue": ("blue", "royalblue", "mediumblue", "dodgerblue"),
    "yellow": ("yellow", "gold"),
    "orange": ("orange", "darkorange"),
    "purple": ("purple", "darkviolet", "darkorchid", "rebeccapurple"),
    "white": ("white", "snow", "whitesmoke"),
    "black": ("black", "#111111"),
    "gray": ("gray", "dimgray"),
}
HALF_EXTENTS = {"small": (6.0, 8.4), "large": (9.8, 12.4)}  # pixels of IMAGE_SIZE
PLACE_SHIFT = 3.0  # pixels, of a center from the named place
LARGEST_ANGLE = 15.0  # degrees either way
SIDES = (64, 96, 128, 200, 256, 320)  # pixels of an image
QUALITIES = (None, 75, 90)  # of JPEG; None: an image that was never compressed
SUPERSAMPLING = 4
SMALLEST_GAP = 1.0  # pixels of IMAGE_SIZE between the boxes of two shapes
LOWEST_CONTRAST = 0.3  # RGB distance (channels 0 to 1) of a shape from its background
RING_HOLE = 0.5
STAR_INNER = 0.42
CROSS_ARM = 0.33

Point = tuple[float, float]


@dataclass(frozen=True)
class Mark:
    """One shape as drawn: its words, and where and how large it is, in pixels of IMAGE_SIZE."""

    colour: str
    css_color: str
    kind: str
    center: Point
    half_extent: float
    angle: float = 0.0  # degrees

    def outline(self) -> list[Point]:
        """Corners around the origin, y down, of a mark of half extent 1; a circle's are many."""
        if self.kind in ("circle", "ring"):
            corners = [(math.cos(t * math.pi / 48), math.sin(t * math.pi / 48)) for t in range(96)]
        elif self.kind == "star":
            radii = [(1.0, STAR_INNER)[i % 2] for i in range(10)]
            corners = [
                (r * math.sin(i * math.pi / 5), -r * math.cos(i * math.pi / 5)) for i, r in enumerate(radii)
            ]
        elif self.kind == "triangle":
            corners = [(0.0, -0.95), (1.0, 0.8), (-1.0, 0.8)]
        elif self.kind == "square":
            corners = [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)]
        else:
            a = CROSS_ARM
            quarter = [(-a, -1.0), (a, -1.0), (a, -a)]
            corners = [_turned(corner, 90.0 * turn) for turn in range(4) for corner in quarter]
        return [_turned(corner, self.angle) for corner in corners]


@dataclass(frozen=True)
class Sketch:
    """An image that somebody drew: a background, marks, pixels per side, and JPEG's quality if any."""

    background: str
    css_background: str
    marks: tuple[Mark, ...]
    side: int = IMAGE_SIZE
    quality: int | None = None

    def draw(self) -> Image.Image:
        """The RGB image, `side` pixels per side."""
        fine = self.side * SUPERSAMPLING
        image = Image.new("RGB", (fine, fine), self.css_background)
        pen = ImageDraw.Draw(image)
        for mark in self.marks:
            scale = fine / IMAGE_SIZE
            for radius, color in ((1.0, mark.css_color), (RING_HOLE, self.css_background)):
                size = mark.half_extent * radius
                points = [
                    ((mark.center[0] + size * x) * scale, (mark.center[1] + size * y) * scale)
                    for x, y in mark.outline()
                ]
                if radius == 1.0 or mark.kind == "ring":
                    pen.polygon(points, fill=color)
        image = image.resize((self.side, self.side), Image.Resampling.LANCZOS)
        if self.quality is None:
            return image
        file = io.BytesIO()
        image.save(file, "JPEG", quality=self.quality)
        return Image.open(file).convert("RGB")


@dataclass(frozen=True)
class ForeignEdit:
    """An edit of somebody's image: the image, and what should be seen after it."""

    before: Sketch
    after: Sketch


def _turned(point: Point, degrees: float) -> Point:
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return point[0] * cosine - point[1] * sine, point[0] * sine + point[1] * cosine


def _mark(shape: Shape, rng: random.Random) -> Mark:
    """A mark that the shape's words describe."""
    half_extent = rng.uniform(*HALF_EXTENTS[shape.size])
    x, y = (
        min(IMAGE_SIZE - half_extent, max(half_extent, middle + rng.uniform(-PLACE_SHIFT, PLACE_SHIFT)))
        for middle in shape.centre
    )
    angle = rng.choice((0.0, rng.uniform(-LARGEST_ANGLE, LARGEST_ANGLE)))
    css = rng.choice(CSS_COLORS[shape.colour])
    return Mark(shape.colour, css, shape.kind, (x, y), half_extent, angle)


def _gap(first: Mark, second: Mark) -> float:
    apart = max(abs(a - b) for a, b in zip(first.center, second.center, strict=True))
    return apart - first.half_extent - second.half_extent


def sketch(scene: Scene, rng: random.Random) -> Sketch:
    """Somebody's image of what the scene's words say."""
    marks = tuple(_mark(shape, rng) for shape in scene.shapes)
    background = rng.choice(CSS_COLORS[scene.background])
    return Sketch(scene.background, background, marks, rng.choice(SIDES), rng.choice(QUALITIES))


def is_clear(sketch: Sketch) -> bool:
    """Whether the marks are apart and stand out from the background."""
    apart = len(sketch.marks) < 2 or _gap(*sketch.marks) >= SMALLEST_GAP
    behind = _rgb(sketch.css_background)
    return apart and all(math.dist(behind, _rgb(mark.css_color)) >= LOWEST_CONTRAST for mark in sketch.marks)


def foreign_edit(edit: Edit, rng: random.Random) -> ForeignEdit:
    """The edit, of an image that somebody drew: what it does not name stays where and as large as it was."""
    while True:
        before = sketch(edit.before, rng)
        after = _edited(edit, before)
        if is_clear(before) and is_clear(after):
            return ForeignEdit(before, after)


def _edited(edit: Edit, before: Sketch) -> Sketch:
    kept = dict(zip(edit.before.shapes, before.marks, strict=True))
    marks = []
    for index, shape in enumerate(edit.after.shapes):
        if shape in kept:
            mark = kept[shape]
        elif edit.kind == "recolour":
            mark = replace(before.marks[index], colour=shape.colour, css_color=shape.colour)
        elif edit.kind == "move":
            mark = replace(before.marks[index], center=shape.centre)
        else:
            mark = Mark(shape.colour, shape.colour, shape.kind, shape.centre, HALF_EXTENT[shape.size])
        marks.append(mark)
    same = edit.after.background == edit.before.background
    background = before.css_background if same else edit.after.background
    return Sketch(edit.after.background, background, tuple(marks))


def _rgb(css_color: str) -> tuple[float, ...]:
    """Channels in [0, 1]."""
    return tuple(channel / 255 for channel in ImageColor.getrgb(css_color)[:3])
