"""The image tokenizer against SigLIP in transformers and a cosine quantizer, on random geometries."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from blip3o_rt.config import TATokConfig
from blip3o_rt.errors import ConfigError
from blip3o_rt.tatok.model import ImageTokenizer
from tests.tatok.oracle import Oracle, oracle, round_weights, runtime_weights, small_config

# Relative L2 of the features: float32 carries 6e-8, in at most four layers of sums of up to 600 products.
FLOAT32 = 5e-6
# How far below the largest cosine the chosen code's may lie: float32 sums of at most 24 products, of features
# that agree within FLOAT32.
COSINE = 1e-5


def relative_l2(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def assert_nearest(codes: Tensor, similarities: Tensor, tolerance: float) -> None:
    chosen = similarities.gather(-1, codes[..., None])[..., 0]
    assert bool((chosen >= similarities.amax(-1) - tolerance).all())


@st.composite
def geometries(draw: st.DrawFn) -> TATokConfig:
    heads = draw(st.integers(1, 4))
    layers = draw(st.integers(1, 4))
    patch = draw(st.integers(1, 14))
    return small_config(
        image_size=patch * draw(st.integers(1, 5)) + draw(st.integers(0, patch - 1)),
        patch_size=patch,
        image_channels=draw(st.sampled_from([1, 3])),
        hidden_size=heads * draw(st.sampled_from([4, 8, 18])),
        intermediate_size=draw(st.integers(1, 60)),
        num_layers=layers,
        num_heads=heads,
        # Not the tower's last state: the published tower of that index is normalized or not by version.
        selected_layer=draw(st.integers(-layers - 1, -2) | st.integers(0, layers - 1)),
        bottleneck_dim=draw(st.integers(2, 24)),
        codebook_size=draw(st.integers(1, 80)),
    )


@settings(deadline=None, derandomize=True, max_examples=40)
@given(config=geometries(), batch=st.integers(1, 2), seed=st.integers(0, 2**16))
def test_features_and_codes_equal_the_oracle(config: TATokConfig, batch: int, seed: int) -> None:
    model = oracle(config, seed)
    ours = ImageTokenizer(config, runtime_weights(config, model, torch.float32))
    pixels = torch.rand(batch, config.image_channels, config.image_size, config.image_size) * 2 - 1

    features, codes = ours.encode(pixels)

    assert features.shape == (batch, config.tokens, config.hidden_size)
    assert codes.shape == (batch, config.tokens)
    assert codes.dtype == torch.int64
    assert relative_l2(features, model.features(pixels)) < FLOAT32
    assert_nearest(codes, model.similarities(model.features(pixels)), COSINE)


def test_codes_vary_and_are_the_oracles() -> None:
    """With a spread codebook no two cosines are near each other: the codes are the oracle's, and many."""
    config = small_config(codebook_size=500)
    model = oracle(config)
    ours = ImageTokenizer(config, runtime_weights(config, model, torch.float32))
    pixels = torch.rand(4, 3, 30, 30) * 2 - 1

    _, codes = ours.encode(pixels)

    assert torch.equal(codes, model.similarities(model.features(pixels)).argmax(-1))
    assert codes.unique().numel() > 20


def bfloat16_pair(config: TATokConfig) -> tuple[Oracle, ImageTokenizer]:
    model = oracle(config)
    round_weights(model, torch.bfloat16)
    return model, ImageTokenizer(config, runtime_weights(config, model, torch.bfloat16))


def test_bfloat16_errs_no_more_than_the_oracle_in_bfloat16() -> None:
    """Against the oracle in float32 over bfloat16 weights; at most 1.5 times its own bfloat16 error."""
    config = small_config(num_layers=5, hidden_size=64, num_heads=4)
    model, ours = bfloat16_pair(config)
    pixels = torch.rand(8, 3, 30, 30) * 2 - 1
    expected = model.features(pixels)

    features, codes = ours.encode(pixels)
    theirs = model.to(torch.bfloat16).features(pixels.to(torch.bfloat16))

    assert features.dtype == torch.bfloat16
    assert relative_l2(features, expected) < 1.5 * relative_l2(theirs, expected)
    # The quantizer works in float32 on the features it is given, whatever the tower's dtype.
    assert_nearest(codes, model.similarities(features), COSINE)


def test_features_are_an_ordinary_tensor() -> None:
    """An inference tensor would refuse these: a write in place where gradients are recorded, a use in one."""
    config = small_config()
    ours = ImageTokenizer(config, runtime_weights(config, oracle(config), torch.float32))
    features, _ = ours.encode(torch.rand(1, 3, 30, 30))
    features.mul_(2)
    (features * torch.ones(1, requires_grad=True)).sum().backward()


def test_layers_above_the_selected_one_are_not_needed() -> None:
    config = small_config(num_layers=5, selected_layer=-3)
    weights = runtime_weights(config, oracle(config), torch.float32)
    assert not any(name.startswith("encoder.encoder.layers.3.") for name in weights)
    assert len(ImageTokenizer(config, weights).layers) == 3


def test_a_batch_equals_its_members_alone_bit_for_bit() -> None:
    config = small_config()
    ours = ImageTokenizer(config, runtime_weights(config, oracle(config), torch.float32))
    pixels = torch.rand(3, 3, 30, 30) * 2 - 1
    features, codes = ours.encode(pixels)
    for index in range(3):
        alone_features, alone_codes = ours.encode(pixels[index : index + 1])
        assert torch.equal(alone_features, features[index : index + 1])
        assert torch.equal(alone_codes, codes[index : index + 1])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_heads": 5}, "num_attention_heads is 5; accepted: a divisor of hidden_size, 24"),
        ({"selected_layer": -5}, "accepted: a hidden state of 3 layers, -4 to 3"),
        ({"selected_layer": 4}, "accepted: a hidden state of 3 layers, -4 to 3"),
        ({"patch_size": 31}, "patch_size is 31; accepted: at most image_size, 30"),
    ],
)
def test_a_geometry_that_is_not_a_tower_is_named(changes: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        dataclasses.replace(small_config(), **changes).check()
