"""Draws scenes: exact antialiased coverage of every shape, blended over the background."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from blip3o_rt.measure.shapes.scene import IMAGE_SIZE, KINDS, PALETTE, PLACES, SIZES, Scene, Shape

SUBSAMPLES = 8  # per pixel and axis
SQUARE_HALF_SIDE = 0.9  # of the half extent, so that a square does not look larger than a circle
RING_HOLE = 0.52
CROSS_ARM = 0.34
STAR_INNER = 0.45


def _polygon(x: np.ndarray, y: np.ndarray, corners: Sequence[tuple[float, float]]) -> np.ndarray:
    """Even-odd test of points against a polygon."""
    inside = np.zeros(x.shape, dtype=bool)
    for (x0, y0), (x1, y1) in zip(corners, [*corners[1:], corners[0]], strict=True):
        crosses = (y0 > y) != (y1 > y)
        with np.errstate(divide="ignore", invalid="ignore"):
            at = x0 + (y - y0) * (x1 - x0) / (y1 - y0) if y0 != y1 else np.full(x.shape, np.inf)
        inside ^= crosses & (x < at)
    return inside


def _star_corners() -> list[tuple[float, float]]:
    radii = [1.05 if i % 2 == 0 else STAR_INNER for i in range(10)]
    return [(r * math.sin(math.pi * i / 5), -r * math.cos(math.pi * i / 5)) for i, r in enumerate(radii)]


def inside(kind: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether points (in half extents, y down) lie in a shape of this kind centred at the origin."""
    if kind == "circle":
        return x**2 + y**2 <= 1
    if kind == "square":
        return np.maximum(abs(x), abs(y)) <= SQUARE_HALF_SIDE
    if kind == "triangle":
        return _polygon(x, y, [(0.0, -1.0), (1.05, 0.85), (-1.05, 0.85)])
    if kind == "star":
        return _polygon(x, y, _star_corners())
    if kind == "ring":
        radius = x**2 + y**2
        return (radius <= 1) & (radius >= RING_HOLE**2)
    if kind == "cross":
        near, far = np.minimum(abs(x), abs(y)), np.maximum(abs(x), abs(y))
        return (near <= CROSS_ARM) & (far <= 1)
    raise ValueError(f"unknown shape '{kind}'; shapes are {', '.join(KINDS)}")


@functools.cache
def coverage(kind: str, half_extent: float, x: float, y: float) -> np.ndarray:
    """Share of every pixel that the shape covers, float32 [H, W]; its centre (x, y) is in pixels."""
    samples = (np.arange(IMAGE_SIZE * SUBSAMPLES) + 0.5) / SUBSAMPLES
    grid_y, grid_x = np.meshgrid((samples - y) / half_extent, (samples - x) / half_extent, indexing="ij")
    hits = inside(kind, grid_x, grid_y)
    blocks = hits.reshape(IMAGE_SIZE, SUBSAMPLES, IMAGE_SIZE, SUBSAMPLES)
    return blocks.mean(axis=(1, 3), dtype=np.float32)


def shape_coverage(shape: Shape) -> np.ndarray:
    """Coverage of a scene's shape, float32 [IMAGE_SIZE, IMAGE_SIZE]."""
    return coverage(shape.kind, shape.half_extent, *shape.centre)


@functools.cache
def _coverage_table() -> torch.Tensor:
    """Every shape's coverage, float32 [kind, size, place, H, W]."""
    table = [
        [[shape_coverage(Shape("red", kind, size, place)) for place in PLACES] for size in SIZES]
        for kind in KINDS
    ]
    return torch.from_numpy(np.array(table))


def _colour(name: str) -> list[float]:
    return [channel / 255 for channel in PALETTE[name]]


def render_batch(scenes: Sequence[Scene]) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [N, 3, H, W] in [0, 1] and the shapes' coverage [N, 1, H, W], both float32."""
    images = torch.tensor([_colour(scene.background) for scene in scenes])[:, :, None, None]
    images = images.repeat(1, 1, IMAGE_SIZE, IMAGE_SIZE)
    covered = torch.zeros(len(scenes), 1, IMAGE_SIZE, IMAGE_SIZE)
    for layer in range(2):
        rows = [i for i, scene in enumerate(scenes) if len(scene.shapes) > layer]
        if not rows:
            continue
        shapes = [scenes[i].shapes[layer] for i in rows]
        keys = [(KINDS.index(s.kind), SIZES.index(s.size), PLACES.index(s.place)) for s in shapes]
        kind, size, place = (torch.tensor(index) for index in zip(*keys, strict=True))
        alpha = _coverage_table()[kind, size, place].unsqueeze(1)
        colours = torch.tensor([_colour(s.colour) for s in shapes])[:, :, None, None]
        images[rows] = images[rows] * (1 - alpha) + colours * alpha
        covered[rows] = torch.maximum(covered[rows], alpha)
    return images, covered


def to_image(image: torch.Tensor) -> Image.Image:
    """An image float [3, H, W] in [0, 1] as an 8-bit RGB image."""
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(pixels.numpy(), "RGB")


def render(scene: Scene) -> Image.Image:
    """One scene as an RGB image of IMAGE_SIZE pixels per side."""
    return to_image(render_batch([scene])[0][0])
