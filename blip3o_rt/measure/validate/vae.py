"""The autoencoder against diffusers: an image encoded, its latent decoded, the decoded image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from blip3o_rt.images import reference_pixels
from blip3o_rt.machine import exact_arithmetic
from blip3o_rt.measure.baselines.published import levels
from blip3o_rt.measure.validate.bounds import tensor_line
from blip3o_rt.measure.validate.images import Compared, Likeness, image_lines
from blip3o_rt.measure.validate.line import Line
from blip3o_rt.measure.validate.subject import Subject
from blip3o_rt.vae.model import Autoencoder


class Coded(NamedTuple):
    """Pixels [1, 3, H, W] that are encoded, their latent [1, C, h, w], and what a given latent decodes to."""

    pixels: Tensor
    latent: Tensor
    decoded: Tensor


def vae_lines(subject: Subject, dtypes: Sequence[str], compared: Compared) -> Iterator[Line]:
    """Encoder and decoder on the same inputs: an image, and the latent that the published encoder makes."""
    exact = _published(subject, "fp32")
    yardstick = _published(subject, "bf16") if "bf16" in dtypes else None
    for dtype in dtypes:
        found = _ours(subject, dtype)
        rounded = yardstick if dtype == "bf16" else None
        if dtype == dtypes[0]:
            yield tensor_line("vae", "image to pixels", "fp32", found.pixels, exact.pixels, None)
        other = rounded.latent if rounded else None
        yield tensor_line("vae", "encode", dtype, found.latent, exact.latent, other)
        other = rounded.decoded if rounded else None
        yield tensor_line("vae", "decode", dtype, found.decoded, exact.decoded, other)
        expected = levels(exact.decoded)
        likeness = compared(f"vae decode {dtype}", levels(found.decoded), expected)
        known = Likeness.of(levels(rounded.decoded), expected) if rounded else None
        yield from image_lines("vae", "decode", dtype, likeness, known)


def _published(subject: Subject, dtype: str) -> Coded:
    model = subject.published(dtype)
    pixels = model.vae_pixels(subject.image)
    return Coded(pixels, model.encode(pixels), model.decode(subject.reference_latent))


def _ours(subject: Subject, dtype: str) -> Coded:
    checkpoint = subject.ours(dtype, "vae")
    autoencoder = Autoencoder(checkpoint.config.vae, checkpoint.weights["vae"])
    pixels = reference_pixels(subject.image, checkpoint.config.image_size)
    with exact_arithmetic(subject.device):
        latent = autoencoder.encode(pixels)
        return Coded(pixels, latent, autoencoder.decode(subject.reference_latent))
