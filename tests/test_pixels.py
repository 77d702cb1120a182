"""Pixels for the autoencoder: sizes, the centre, and values as torchvision's transforms define them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from blip3o_rt.images import reference_pixels


def gradient(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards."""
    red = np.linspace(0, 255, width).astype(np.uint8)[None, :].repeat(height, 0)
    green = np.linspace(0, 255, height).astype(np.uint8)[:, None].repeat(width, 1)
    return Image.fromarray(np.stack([red, green, np.full_like(red, 7)], axis=-1))


@pytest.mark.parametrize(
    ("size", "resized"),
    [
        ((96, 64), (48, 32)),
        ((64, 96), (32, 48)),
        ((33, 100), (32, 96)),
        ((100, 33), (96, 32)),
        ((1, 1), (32, 32)),
    ],
)
def test_short_side_is_resized_and_the_centre_kept(size: tuple[int, int], resized: tuple[int, int]) -> None:
    image = gradient(*size)
    whole = np.asarray(image.resize(resized, Image.Resampling.BILINEAR)).astype(np.float32)
    left, top = (resized[0] - 32) // 2, (resized[1] - 32) // 2
    expected = whole[top : top + 32, left : left + 32] / 255 * 2 - 1

    pixels = reference_pixels(image, 32)

    assert pixels.shape == (1, 3, 32, 32)
    assert pixels.dtype == torch.float32
    assert np.abs(pixels[0].permute(1, 2, 0).numpy() - expected).max() < 1e-6


def test_an_odd_rest_is_halved_to_the_even_side() -> None:
    """The long side is truncated; half a pixel of offset rounds to even, as Python's round does."""
    image = gradient(35, 32)
    expected = np.asarray(image).astype(np.float32)[:, 2:34] / 255 * 2 - 1
    assert np.abs(reference_pixels(image, 32)[0].permute(1, 2, 0).numpy() - expected).max() < 1e-6


def test_black_and_white_are_exact() -> None:
    assert torch.equal(reference_pixels(Image.new("RGB", (50, 60), "white"), 16), torch.ones(1, 3, 16, 16))
    assert torch.equal(reference_pixels(Image.new("RGB", (50, 60), "black"), 16), -torch.ones(1, 3, 16, 16))
