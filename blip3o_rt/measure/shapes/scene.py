"""Scenes of flat shapes: what an image may hold, what is held out, and random scenes."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 40),
    "green": (34, 150, 70),
    "blue": (40, 80, 210),
    "yellow": (255, 225, 40),
    "orange": (250, 125, 10),
    "purple": (150, 40, 190),
    "white": (250, 250, 250),
    "black": (20, 20, 20),
    "gray": (128, 128, 128),
}
BACKGROUNDS = tuple(PALETTE)
COLOURS = tuple(name for name in PALETTE if name != "gray")
KINDS = ("circle", "square", "triangle", "star", "ring", "cross")
SIZES = ("small", "large")
PLACES = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")

IMAGE_SIZE = 64  # pixels per side
HALF_EXTENT = {"small": 7.0, "large": 11.0}  # pixels
GRID_CENTRES = (12.5, 32.0, 51.5)  # pixels, of the three columns and rows
SAME_COLOUR_GAP = 4.0  # pixels two shapes of one colour must stay apart, so that they never merge
HELD_OUT_SHARE = 0.1
HELD_OUT_SEED = 20251
TWO_SHAPES_SHARE = 0.5
NO_SHAPE_SHARE = 0.02


@dataclass(frozen=True)
class Shape:
    """One flat shape: a palette colour, a kind, a size and one of nine places."""

    colour: str
    kind: str
    size: str
    place: str

    @property
    def centre(self) -> tuple[float, float]:
        """(x, y) in pixels."""
        row, column = divmod(PLACES.index(self.place), 3)
        return GRID_CENTRES[column], GRID_CENTRES[row]

    @property
    def half_extent(self) -> float:
        """Half the side of the bounding square, pixels."""
        return HALF_EXTENT[self.size]


@dataclass(frozen=True)
class Scene:
    """A background colour and up to two shapes."""

    background: str
    shapes: tuple[Shape, ...] = ()

    def with_shape(self, index: int, shape: Shape) -> Scene:
        """The same scene with one shape replaced."""
        shapes = list(self.shapes)
        shapes[index] = shape
        return replace(self, shapes=tuple(shapes))

    def shows_the_same(self, other: Scene) -> bool:
        """Whether two scenes look the same, whatever the order of their shapes."""
        return self.background == other.background and set(self.shapes) == set(other.shapes)


def _held_out_combinations() -> frozenset[tuple[str, str, str]]:
    """A tenth of all (colour, kind, background) triples."""
    triples = [(c, k, b) for c in COLOURS for k in KINDS for b in BACKGROUNDS if c != b]
    return frozenset(random.Random(HELD_OUT_SEED).sample(triples, round(len(triples) * HELD_OUT_SHARE)))


HELD_OUT = _held_out_combinations()


def gap(first: Shape, second: Shape) -> float:
    """Distance between the bounding squares, pixels; negative where they overlap."""
    reach = first.half_extent + second.half_extent
    return max(abs(a - b) for a, b in zip(first.centre, second.centre, strict=True)) - reach


def is_drawable(scene: Scene) -> bool:
    """Whether every shape is visible and none touches another."""
    if any(shape.colour == scene.background for shape in scene.shapes):
        return False
    if len(scene.shapes) < 2:
        return True
    first, second = scene.shapes
    return gap(first, second) >= (SAME_COLOUR_GAP if first.colour == second.colour else 1.0)


def is_held_out(scene: Scene) -> bool:
    """Whether the scene shows a (colour, kind, background) combination that training never sees."""
    return any((shape.colour, shape.kind, scene.background) in HELD_OUT for shape in scene.shapes)


def random_shape(rng: random.Random) -> Shape:
    """A shape with every property uniform."""
    return Shape(rng.choice(COLOURS), rng.choice(KINDS), rng.choice(SIZES), rng.choice(PLACES))


def random_scene(rng: random.Random, shapes: int | None = None) -> Scene:
    """A drawable scene, held-out ones included; shapes fixes how many (default: mostly one or two)."""
    if shapes is None:
        draw = rng.random()
        shapes = 0 if draw < NO_SHAPE_SHARE else (2 if draw < NO_SHAPE_SHARE + TWO_SHAPES_SHARE else 1)
    while True:
        scene = Scene(rng.choice(BACKGROUNDS), tuple(random_shape(rng) for _ in range(shapes)))
        if is_drawable(scene):
            return scene


def training_scene(rng: random.Random, shapes: int | None = None) -> Scene:
    """A drawable scene without any held-out combination."""
    while True:
        scene = random_scene(rng, shapes)
        if not is_held_out(scene):
            return scene


def held_out_scene(rng: random.Random) -> Scene:
    """A drawable scene of one shape in a held-out combination."""
    colour, kind, background = rng.choice(sorted(HELD_OUT))
    return Scene(background, (Shape(colour, kind, rng.choice(SIZES), rng.choice(PLACES)),))
