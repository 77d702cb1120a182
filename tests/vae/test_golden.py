"""The autoencoder and its pixels on the reference checkpoints, against what the published code computed."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from blip3o_rt.checkpoint.load import load_checkpoint
from blip3o_rt.images import load_reference, reference_pixels
from blip3o_rt.vae.model import Autoencoder
from tests.vae.oracle import oracle_decode, oracle_encode
from tests.vae.test_autoencoder import centred, relative_l2

PREFIX = "model.sana_vae."


def autoencoder(folder: Path, dtype: torch.dtype) -> tuple[Autoencoder, int]:
    """The folder's autoencoder, and the side of its images."""
    checkpoint = load_checkpoint(folder / "checkpoint", dtype=dtype)
    return Autoencoder(checkpoint.config.vae, checkpoint.weights["vae"]), checkpoint.config.image_size


def original(folder: Path) -> AutoencoderDC:
    """diffusers' model over the same weights, read from the published layout by nothing of ours."""
    config = json.loads((folder / "checkpoint" / "sana" / "vae" / "config.json").read_text())
    model = AutoencoderDC.from_config(config)
    with safe_open(folder / "checkpoint" / "model.safetensors", "pt") as file:
        names = [name for name in file.keys() if name.startswith(PREFIX)]  # noqa: SIM118 (not a mapping)
        model.load_state_dict({name.removeprefix(PREFIX): file.get_tensor(name).float() for name in names})
    return model.eval()


@pytest.mark.parametrize("name", ["t2i", "edit"])
def test_decoded_image_is_the_published_one(reference_dir: Path, name: str) -> None:
    """Every value within one gray level: a float32 rounding may fall on the other side of a half."""
    folder = reference_dir / name
    decoder, _ = autoencoder(folder, torch.float32)
    image = decoder.decode(load_file(folder / "golden.safetensors")["latents"])

    levels = (image[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy().astype(int)
    difference = np.abs(levels - np.asarray(Image.open(folder / "golden.png")).astype(int))

    assert difference.max() <= 1
    assert (difference == 0).mean() > 0.9999


def test_reference_latent_is_the_published_one(reference_dir: Path) -> None:
    folder = reference_dir / "edit"
    encoder, size = autoencoder(folder, torch.float32)
    pixels = reference_pixels(load_reference(folder / "input.png"), size)
    expected = load_file(folder / "golden.safetensors")["ref_latents"]
    assert relative_l2(encoder.encode(pixels), expected) < 1e-5


def test_bfloat16_errs_no_more_than_the_published_modules_in_bfloat16(reference_dir: Path) -> None:
    """On the reference weights; at most 1.5 times diffusers' own bfloat16 error, over several images.

    In a flat image every position errs alike, so that the error of one is as much luck as precision.
    """
    folder = reference_dir / "edit"
    ours, size = autoencoder(folder, torch.bfloat16)
    exact, rounded = original(folder), original(folder).to(torch.bfloat16)
    latents = load_file(folder / "golden.safetensors")["latents"].split(16, dim=2)
    images = [folder / "input.png", folder / "golden.png", reference_dir / "t2i" / "golden.png"]
    pixels = [reference_pixels(load_reference(image), size // 4) for image in images]

    def decoding_error(decode: Callable[[Tensor], Tensor]) -> float:
        return rms([relative_l2(centred(decode(x)), centred(oracle_decode(exact, x))) for x in latents])

    def encoding_error(encode: Callable[[Tensor], Tensor]) -> float:
        return rms([relative_l2(encode(x), oracle_encode(exact, x)) for x in pixels])

    assert decoding_error(ours.decode) < 1.5 * decoding_error(partial(oracle_decode, rounded))
    assert encoding_error(ours.encode) < 1.5 * encoding_error(partial(oracle_encode, rounded))


def rms(values: list[float]) -> float:
    return float(np.sqrt(np.mean(np.square(values))))
