"""The image tokenizer against transformers: pixels, features and codes of an image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from blip3o_rt.images import tower_pixels
from blip3o_rt.machine import exact_arithmetic
from blip3o_rt.measure.validate.bounds import tensor_line
from blip3o_rt.measure.validate.choices import choice_line
from blip3o_rt.measure.validate.line import Line
from blip3o_rt.measure.validate.subject import Subject
from blip3o_rt.tatok.model import ImageTokenizer


def tatok_lines(subject: Subject, dtypes: Sequence[str]) -> Iterator[Line | str]:
    """The tokenizer's lines in each dtype; a note where the checkpoint has none."""
    if subject.config.ta_tok is None:
        yield "tatok: the checkpoint has no image tokenizer"
        return
    model = subject.published("fp32")
    pixels = model.tower_pixels(subject.image)
    exact = model.features(pixels)
    scores = model.code_scores(exact)
    del model
    yardstick = _published_bf16(subject, pixels) if "bf16" in dtypes else None
    yield tensor_line(
        "tatok",
        "image to pixels",
        "fp32",
        tower_pixels(subject.image, subject.config.ta_tok.image_size),
        pixels,
        None,
    )
    for dtype in dtypes:
        features, codes = _ours(subject, dtype, pixels)
        rounded = yardstick if dtype == "bf16" else None
        yield tensor_line("tatok", "features", dtype, features, exact, rounded[0] if rounded else None)
        yield choice_line("tatok", "codes", dtype, codes[0], scores, rounded[1] if rounded else None, "code")


def _published_bf16(subject: Subject, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Features, and every code's scores."""
    model = subject.published("bf16")
    features = model.features(pixels)
    return features, model.code_scores(features)


def _ours(subject: Subject, dtype: str, pixels: Tensor) -> tuple[Tensor, Tensor]:
    checkpoint = subject.ours(dtype, "ta_tok")
    config = checkpoint.config.ta_tok
    if config is None:
        raise ValueError("no image tokenizer")
    tokenizer = ImageTokenizer(config, checkpoint.weights["ta_tok"])
    with exact_arithmetic(subject.device):
        return tokenizer.encode(pixels)
