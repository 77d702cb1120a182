"""The autoencoder against diffusers' AutoencoderDC on random geometries, both ways."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from blip3o_rt.config import VAEConfig, VAEStageConfig
from blip3o_rt.errors import ConfigError
from blip3o_rt.vae.model import Autoencoder
from tests.vae.oracle import (
    SMALL_STAGES,
    oracle,
    oracle_decode,
    oracle_encode,
    round_weights,
    runtime_weights,
    small_config,
)

# Relative L2 of a result in -1..1. float32 carries 6e-8; a result passes some twenty convolutions of at most
# 300 products each, with a norm after each, and comes out of either implementation within about 1e-6.
FLOAT32 = 1e-5
# The oracle takes norms and linear attention in float32 even where its weights are float64.
FLOAT64 = 2e-6


def relative_l2(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def centred(image: Tensor) -> Tensor:
    """0..1 to -1..1, so that an error is not measured against gray."""
    return 2 * image - 1


def is_valid(config: VAEConfig) -> bool:
    try:
        config.check()
    except ConfigError:
        return False
    return True


@st.composite
def geometries(draw: st.DrawFn) -> VAEConfig:
    count = draw(st.integers(1, 4))

    def stage(index: int) -> VAEStageConfig:
        fewest = 0 if index in (0, count - 1) and count > 1 else 1
        return VAEStageConfig(
            channels=draw(st.sampled_from([8, 16, 24, 32])),
            block=draw(st.sampled_from(["ResBlock", "EfficientViTBlock"])),
            layers=draw(st.integers(fewest, 2)),
            multiscales=draw(st.sampled_from([(), (3,), (5,), (3, 5)])),
        )

    return small_config(
        latent_channels=draw(st.sampled_from([4, 8])),
        attention_head_dim=draw(st.sampled_from([4, 8, 16])),
        encoder_stages=tuple(stage(index) for index in range(count)),
        decoder_stages=tuple(stage(index) for index in range(count)),
        downsample=draw(st.sampled_from(["Conv", "pixel_unshuffle"])),
        upsample=draw(st.sampled_from(["interpolate", "pixel_shuffle"])),
        encoder_out_shortcut=draw(st.booleans()),
        decoder_in_shortcut=draw(st.booleans()),
        scaling_factor=draw(st.sampled_from([0.41407, 1.0])),
    )


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    config=geometries().filter(is_valid),
    batch=st.integers(1, 2),
    height=st.integers(1, 5),
    width=st.integers(1, 5),
    seed=st.integers(0, 2**16),
)
def test_both_ways_equal_the_oracle(
    config: VAEConfig, batch: int, height: int, width: int, seed: int
) -> None:
    model = oracle(config, seed)
    ours = Autoencoder(config, runtime_weights(config, model, torch.float32))
    latent = torch.randn(batch, config.latent_channels, height, width)
    pixels = torch.rand(batch, 3, height * config.compression, width * config.compression) * 2 - 1

    image, encoded = ours.decode(latent), ours.encode(pixels)

    assert image.shape == pixels.shape
    assert image.dtype == encoded.dtype == torch.float32
    assert relative_l2(centred(image), centred(oracle_decode(model, latent))) < FLOAT32
    assert relative_l2(encoded, oracle_encode(model, pixels)) < FLOAT32


@pytest.mark.parametrize("upsample", ["interpolate", "pixel_shuffle"])
@pytest.mark.parametrize("downsample", ["Conv", "pixel_unshuffle"])
def test_float64_is_the_same_mathematics(upsample: str, downsample: str) -> None:
    config = small_config(upsample=upsample, downsample=downsample)
    model = oracle(config).double()
    ours = Autoencoder(config, runtime_weights(config, model, torch.float64))
    latent = torch.randn(1, 8, 3, 7, dtype=torch.float64)
    pixels = torch.rand(1, 3, 24, 56, dtype=torch.float64) * 2 - 1

    assert relative_l2(centred(ours.decode(latent)), centred(oracle_decode(model, latent))) < FLOAT64
    assert relative_l2(ours.encode(pixels), oracle_encode(model, pixels)) < FLOAT64


@pytest.mark.parametrize(
    ("downsample", "upsample"),
    [
        ("Conv", "interpolate"),
        ("pixel_unshuffle", "pixel_shuffle"),
        pytest.param("Conv", "pixel_shuffle", marks=pytest.mark.exhaustive),
        pytest.param("pixel_unshuffle", "interpolate", marks=pytest.mark.exhaustive),
    ],
)
def test_bfloat16_errs_no_more_than_the_oracle_in_bfloat16(upsample: str, downsample: str) -> None:
    """Against the oracle in float32 over bfloat16 weights; at most 1.5 times its own bfloat16 error.

    The median of the errors, over four models: ReLU attention jumps where a rounding switches off the only
    channel in which a query meets the keys, and with heads this narrow a jump or two decides an L2 norm, on
    either side.
    """
    config = small_config(upsample=upsample, downsample=downsample)
    ours: list[Tensor] = []
    theirs: list[Tensor] = []
    for seed in range(4):
        model = oracle(config, seed)
        round_weights(model, torch.bfloat16)
        rounded = Autoencoder(config, runtime_weights(config, model, torch.bfloat16))
        latent, pixels = torch.randn(2, 8, 8, 8), torch.rand(2, 3, 64, 64) * 2 - 1
        image, encoded = oracle_decode(model, latent), oracle_encode(model, pixels)
        model.to(torch.bfloat16)
        ours.append(median_errors(rounded.decode(latent) - image, rounded.encode(pixels) - encoded))
        theirs.append(
            median_errors(oracle_decode(model, latent) - image, oracle_encode(model, pixels) - encoded)
        )
    ratios = torch.stack(ours).mean(0) / torch.stack(theirs).mean(0)
    assert ratios.max() < 1.5, f"decode and encode: {ratios.tolist()}"


def median_errors(*differences: Tensor) -> Tensor:
    return torch.stack([difference.abs().median() for difference in differences])


def test_a_batch_equals_its_members_alone_bit_for_bit() -> None:
    config = small_config()
    ours = Autoencoder(config, runtime_weights(config, oracle(config), torch.float32))
    latent, pixels = torch.randn(3, 8, 4, 5), torch.rand(3, 3, 32, 40) * 2 - 1

    images, encoded = ours.decode(latent), ours.encode(pixels)

    for index in range(3):
        alone = slice(index, index + 1)
        assert torch.equal(ours.decode(latent[alone]), images[alone])
        assert torch.equal(ours.encode(pixels[alone]), encoded[alone])


def test_the_arguments_are_left_as_they_were() -> None:
    config = small_config()
    ours = Autoencoder(config, runtime_weights(config, oracle(config), torch.float32))
    latent = torch.randn(1, 8, 4, 4).to(memory_format=torch.channels_last)
    pixels = torch.randn(1, 3, 32, 32).to(memory_format=torch.channels_last)
    latent_before, pixels_before = latent.clone(), pixels.clone()

    ours.decode(latent)
    ours.encode(pixels)

    assert torch.equal(latent, latent_before)
    assert torch.equal(pixels, pixels_before)


def test_results_are_ordinary_tensors() -> None:
    """An inference tensor would refuse these: a write in place where gradients are recorded, a use in one."""
    config = small_config()
    ours = Autoencoder(config, runtime_weights(config, oracle(config), torch.float32))
    for result in (ours.decode(torch.randn(1, 8, 4, 4)), ours.encode(torch.randn(1, 3, 32, 32))):
        result.mul_(2)
        (result * torch.ones(1, requires_grad=True)).sum().backward()


def test_shift_factor_moves_the_latent_before_it_is_scaled() -> None:
    config = small_config(shift_factor=0.25)
    plain_config = dataclasses.replace(config, shift_factor=0.0)
    weights = runtime_weights(config, oracle(config), torch.float32)
    shifted, plain = Autoencoder(config, weights), Autoencoder(plain_config, weights)
    latent, pixels = torch.randn(1, 8, 4, 4), torch.rand(1, 3, 32, 32) * 2 - 1
    scaled_shift = 0.25 * config.scaling_factor

    assert relative_l2(shifted.decode(latent), plain.decode(latent + scaled_shift)) < 1e-6
    assert relative_l2(shifted.encode(pixels), plain.encode(pixels) - scaled_shift) < 1e-6


def with_stage(index: int, **changes: object) -> tuple[VAEStageConfig, ...]:
    stages = list(SMALL_STAGES)
    stages[index] = dataclasses.replace(stages[index], **changes)  # type: ignore[arg-type]
    return tuple(stages)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"downsample": "maxpool"}, "'maxpool'; accepted: 'Conv' or 'pixel_unshuffle'"),
        ({"upsample": "bilinear"}, "'bilinear'; accepted: 'interpolate' or 'pixel_shuffle'"),
        ({"encoder_stages": SMALL_STAGES[:3]}, "as many stages as encoder_block_out_channels"),
        ({"decoder_stages": with_stage(1, block="ViT")}, "decoder_block_types is 'ViT'"),
        ({"encoder_stages": with_stage(2, layers=0)}, r"encoder_layers_per_block is \[.*0.*\]"),
        ({"decoder_stages": with_stage(2, channels=4)}, "at least attention_head_dim"),
        (
            {"decoder_stages": with_stage(2, multiscales=(4,))},
            r"decoder_qkv_multiscales is \[4\]; accepted: odd",
        ),
        ({"encoder_stages": with_stage(1, channels=24)}, "divide 4 times their finer neighbor"),
        ({"decoder_stages": with_stage(3, channels=36)}, "divide 4 times their finer neighbor"),
        ({"latent_channels": 12}, "latent_channels is 12; accepted: a divisor of"),
        (
            {"downsample": "pixel_unshuffle", "encoder_stages": with_stage(1, channels=2)},
            "multiples of 4, with downsample_block_type pixel_unshuffle",
        ),
        (
            {"encoder_stages": with_stage(0, layers=0)[:1], "decoder_stages": SMALL_STAGES[:1]},
            "0 only for the first and the last stage of several",
        ),
    ],
)
def test_a_geometry_that_is_not_a_dc_ae_is_named(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        small_config(**changes).check()
