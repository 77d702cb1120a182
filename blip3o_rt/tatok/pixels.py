"""Pixels as the SigLIP vision tower was trained to see them."""

from __future__ import annotations

from PIL import Image
from torch import Tensor

from blip3o_rt.images import normalised_pixels


def tower_pixels(image: Image.Image, size: int) -> Tensor:
    """An RGB picture squeezed to size x size (bicubic) -> float32 [1, 3, size, size] in -1..1."""
    return normalised_pixels(image.resize((size, size), Image.Resampling.BICUBIC))
