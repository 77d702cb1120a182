"""The image tokenizer and its pixels on the reference checkpoint, against what the published code gave."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from blip3o_rt.checkpoint.load import load_checkpoint
from blip3o_rt.config import ModelConfig
from blip3o_rt.images import load_reference, tower_pixels
from blip3o_rt.tatok.model import ImageTokenizer
from tests.tatok.oracle import Oracle
from tests.tatok.test_tokenizer import relative_l2

PREFIX = "model.vision_tower.vision_tower."


def tokenizer(folder: Path, dtype: torch.dtype) -> tuple[ImageTokenizer, ModelConfig]:
    checkpoint = load_checkpoint(folder / "checkpoint", dtype=dtype)
    assert checkpoint.config.ta_tok is not None
    return ImageTokenizer(checkpoint.config.ta_tok, checkpoint.weights["ta_tok"]), checkpoint.config


def test_pixels_are_equal_bit_for_bit(reference_dir: Path) -> None:
    folder = reference_dir / "edit"
    expected = load_file(folder / "golden.safetensors")["siglip_pixels"]
    assert torch.equal(tower_pixels(load_reference(folder / "input.png"), expected.shape[-1]), expected)


def test_features_and_tokens_are_the_published_ones(reference_dir: Path) -> None:
    """Features within 5e-6 relative L2 (1e-6 was measured), the ids of all tokens equal."""
    folder = reference_dir / "edit"
    ours, config = tokenizer(folder, torch.float32)
    golden = load_file(folder / "golden.safetensors")

    features, codes = ours.encode(golden["siglip_pixels"])

    assert relative_l2(features, golden["und_feats"]) < 5e-6
    assert torch.equal(codes[0] + config.image_tokens.image_start_token_id, golden["und_tokens"])


def test_bfloat16_errs_no_more_than_the_published_modules_in_bfloat16(reference_dir: Path) -> None:
    """On the reference weights; at most 1.5 times the bfloat16 error of SigLIP in transformers."""
    folder = reference_dir / "edit"
    ours, config = tokenizer(folder, torch.bfloat16)
    assert config.ta_tok is not None
    model = Oracle(config.ta_tok).eval()
    with safe_open(folder / "checkpoint" / "model.safetensors", "pt") as file:
        names = [PREFIX + name for name in model.state_dict()]
        model.load_state_dict({name.removeprefix(PREFIX): file.get_tensor(name).float() for name in names})
    golden = load_file(folder / "golden.safetensors")
    noise = torch.rand(golden["siglip_pixels"].shape, generator=torch.Generator().manual_seed(0)) * 2 - 1

    for pixels in (golden["siglip_pixels"], noise):
        expected = model.float().features(pixels)
        theirs = model.to(torch.bfloat16).features(pixels.to(torch.bfloat16))
        assert relative_l2(ours.encode(pixels)[0], expected) < 1.5 * relative_l2(theirs, expected)
