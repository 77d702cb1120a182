"""Pixels of a reference picture as the autoencoder was trained to see them."""

from __future__ import annotations

from PIL import Image
from torch import Tensor

from blip3o_rt.images import normalised_pixels


def reference_pixels(image: Image.Image, size: int) -> Tensor:
    """The centre square of an RGB picture -> float32 [1, 3, size, size] in -1..1.

    The short side is resized to `size` (bilinear), the long side in proportion, its fraction dropped; then
    the centre is cut out.
    """
    width, height = image.size
    short = min(width, height)
    resized = (int(size * width / short), int(size * height / short))
    left, top = (round((side - size) / 2) for side in resized)
    square = image.resize(resized, Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))
    return normalised_pixels(square)
