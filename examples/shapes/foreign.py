"""References as other people draw them: sizes, places, angles and colors are only near the named ones.

Sizes, places and angles vary continuously, colors within their hue's range. Images are drawn at other
resolutions with smooth or hard edges, resized by several filters, and compressed. The scene that they are
drawn from is their label: it is how the model's own world says what they show.
"""

from __future__ import annotations

import colorsys
import io
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from blip3o_rt.measure.shapes.render import inside, render_batch
from blip3o_rt.measure.shapes.scene import IMAGE_SIZE, Scene, Shape

RGB = tuple[float, float, float]  # channels in [0, 1]

HALF_EXTENTS = {"small": (5.6, 8.7), "large": (9.5, 12.8)}  # pixels of IMAGE_SIZE
PLACE_SHIFT = 3.5  # pixels, of a center from the named place
ANGLES = {"star": 36.0, "circle": 0.0, "ring": 0.0}  # degrees either way; another kind turns by OTHER_ANGLE
OTHER_ANGLE = 18.0
TURNED_SHARE = 0.5
HUES = {
    "red": (-14, 8),
    "green": (95, 155),
    "blue": (205, 245),
    "yellow": (48, 62),
    "orange": (20, 41),
    "purple": (266, 303),
}  # degrees
DARK = ("red", "green", "blue", "purple")  # what keeps its name in the dark: dark yellow is olive
GRAYS = {"white": (0.9, 1.0), "black": (0.0, 0.14), "gray": (0.42, 0.62)}
LOWEST_CONTRAST = 0.25  # RGB distance (channels 0 to 1) of a shape from its background
SMALLEST_GAP = 1.0  # pixels between two shapes' bounding squares
RESOLUTIONS = (40, 48, 64, 64, 80, 96, 128, 192, 256)  # pixels per side
PIXEL_ART = (32, 48, 64)
PIXEL_ART_SHARE = 0.15
GRADIENT_SHARE, LARGEST_GRADIENT = 0.3, 0.06  # of the images; from side to side
NOISE_SHARE, NOISE = 0.3, (0.005, 0.03)  # of the images; standard deviation
COMPRESSIONS = (None, None, "JPEG", "JPEG", "WEBP")
QUALITIES = (55, 95)
FILTERS = (
    Image.Resampling.BICUBIC,
    Image.Resampling.BILINEAR,
    Image.Resampling.LANCZOS,
    Image.Resampling.BOX,
)


@dataclass(frozen=True)
class Figure:
    """A shape as somebody drew it: center and half extent in pixels of IMAGE_SIZE, angle in radians."""

    kind: str
    center: tuple[float, float]
    half_extent: float
    angle: float
    rgb: RGB

    def gap(self, other: Figure) -> float:
        """Distance between the bounding squares before they are turned, pixels."""
        apart = max(abs(a - b) for a, b in zip(self.center, other.center, strict=True))
        return apart - self.half_extent - other.half_extent


def color(name: str, rng: random.Random) -> RGB:
    """Any color that people call by this name."""
    if name in GRAYS:
        level = rng.uniform(*GRAYS[name])
        red, green, blue = (min(1.0, max(0.0, level + rng.uniform(-0.02, 0.02))) for _ in range(3))
        return red, green, blue
    hue = rng.uniform(*HUES[name]) / 360 % 1.0
    return colorsys.hsv_to_rgb(hue, rng.uniform(0.66, 1.0), rng.uniform(0.48 if name in DARK else 0.85, 1.0))


def figure(shape: Shape, rng: random.Random) -> Figure:
    """A figure that the shape's words describe."""
    half_extent = rng.uniform(*HALF_EXTENTS[shape.size])
    x, y = (
        min(IMAGE_SIZE - half_extent, max(half_extent, middle + rng.uniform(-PLACE_SHIFT, PLACE_SHIFT)))
        for middle in shape.centre
    )
    reach = math.radians(ANGLES.get(shape.kind, OTHER_ANGLE))
    angle = rng.uniform(-reach, reach) if rng.random() < TURNED_SHARE else 0.0
    return Figure(shape.kind, (x, y), half_extent, angle, color(shape.colour, rng))


def figures(scene: Scene, rng: random.Random) -> tuple[RGB, list[Figure]]:
    """A background color and figures that stand out from it and do not touch."""
    while True:
        background = color(scene.background, rng)
        found = [figure(shape, rng) for shape in scene.shapes]
        apart = len(found) < 2 or found[0].gap(found[1]) >= SMALLEST_GAP
        if apart and all(math.dist(background, one.rgb) >= LOWEST_CONTRAST for one in found):
            return background, found


def coverage(figure: Figure, side: int, subsamples: int) -> tuple[slice, slice, np.ndarray]:
    """Rows, columns and the share of each of their pixels that a figure covers, of side x side pixels."""
    scale = side / IMAGE_SIZE
    (x, y), extent = (value * scale for value in figure.center), figure.half_extent * scale
    reach = 1.5 * extent
    top, left = max(0, math.floor(y - reach)), max(0, math.floor(x - reach))
    bottom, right = min(side, math.ceil(y + reach)), min(side, math.ceil(x + reach))
    rows = ((np.arange((bottom - top) * subsamples) + 0.5) / subsamples + top - y) / extent
    columns = ((np.arange((right - left) * subsamples) + 0.5) / subsamples + left - x) / extent
    down, across = np.meshgrid(rows, columns, indexing="ij")
    cosine, sine = math.cos(figure.angle), math.sin(figure.angle)
    hits = inside(figure.kind, across * cosine + down * sine, down * cosine - across * sine)
    blocks = hits.reshape(bottom - top, subsamples, right - left, subsamples)
    return slice(top, bottom), slice(left, right), blocks.mean(axis=(1, 3), dtype=np.float32)


def draw(
    background: RGB, figures: Sequence[Figure], side: int, subsamples: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels [side, side, 3] in [0, 1] and the figures' coverage [side, side], float32."""
    pixels = np.empty((side, side, 3), dtype=np.float32)
    pixels[:] = background
    covered = np.zeros((side, side), dtype=np.float32)
    for one in figures:
        rows, columns, alpha = coverage(one, side, subsamples)
        pixels[rows, columns] += alpha[..., None] * (np.array(one.rgb, np.float32) - pixels[rows, columns])
        covered[rows, columns] = np.maximum(covered[rows, columns], alpha)
    return pixels, covered


def _weathered(pixels: np.ndarray, rng: random.Random) -> np.ndarray:
    """Pixels with, now and then, a light gradient and slight noise."""
    side = len(pixels)
    if rng.random() < GRADIENT_SHARE:
        down, across = (rng.uniform(-LARGEST_GRADIENT, LARGEST_GRADIENT) for _ in range(2))
        ramp = np.linspace(-0.5, 0.5, side, dtype=np.float32)
        pixels = pixels + (down * ramp[:, None] + across * ramp[None, :])[..., None]
    if rng.random() < NOISE_SHARE:
        noise = np.random.default_rng(rng.getrandbits(32))
        pixels = pixels + noise.normal(0, rng.uniform(*NOISE), pixels.shape)
    return pixels


def _compressed(image: Image.Image, rng: random.Random) -> Image.Image:
    kind = rng.choice(COMPRESSIONS)
    if kind is None:
        return image
    file = io.BytesIO()
    image.save(file, kind, quality=rng.randint(*QUALITIES))
    return Image.open(file).convert("RGB")


def reference(background: RGB, figures: Sequence[Figure], rng: random.Random) -> Image.Image:
    """An image of figures as somebody might have made it, IMAGE_SIZE pixels per side."""
    pixel_art = rng.random() < PIXEL_ART_SHARE
    side = rng.choice(PIXEL_ART if pixel_art else RESOLUTIONS)
    pixels, _ = draw(background, figures, side, 1 if pixel_art else max(2, 256 // side))
    pixels = _weathered(pixels, rng)
    image = Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8), "RGB")
    if pixel_art:
        enlarged = side * rng.choice((1, 2, 4, 8))
        image = image.resize((enlarged, enlarged), Image.Resampling.NEAREST)
    return _compressed(image, rng).resize((IMAGE_SIZE, IMAGE_SIZE), rng.choice(FILTERS))


def draw_references(scenes: Sequence[Scene], rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    """Foreign images [N, 3, H, W] in [0, 1] of scenes, and the coverage [N, 1, H, W] of what they show."""
    drawn = [figures(scene, rng) for scene in scenes]
    images = np.stack([np.asarray(reference(background, found, rng)) for background, found in drawn])
    covered = np.stack([draw(background, found, IMAGE_SIZE, 4)[1] for background, found in drawn])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255, torch.from_numpy(covered).unsqueeze(1)


def draw_mixed(
    scenes: Sequence[Scene], foreign: int, rng: random.Random
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and coverage of scenes: the first `foreign` as others draw them, the rest exact."""
    parts = []
    if foreign:
        parts.append(draw_references(scenes[:foreign], rng))
    if foreign < len(scenes):
        parts.append(render_batch(scenes[foreign:]))
    images, covered = zip(*parts, strict=True)
    return torch.cat(images), torch.cat(covered)
