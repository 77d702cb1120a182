"""Tiles are the whole image: the same numbers, but for the rounding of convolutions of other sizes.

In float64 a tile may differ from the whole by 1e-12: that is rounding (1e-16) through some twenty
convolutions, while a margin one cell too narrow shows at 1e-4 or more.
"""

from __future__ import annotations

import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from blip3o_rt.config import EditConfig, VAEConfig, VAEStageConfig
from blip3o_rt.errors import ParameterError
from blip3o_rt.graphs import GraphRunner
from blip3o_rt.measure.random_checkpoint import preset, write_random_checkpoint
from blip3o_rt.pipeline import Pipeline
from blip3o_rt.switches import check_tier
from blip3o_rt.vae import tiles as tiling
from blip3o_rt.vae.blocks import Block
from blip3o_rt.vae.model import Autoencoder
from blip3o_rt.vae.tiles import TiledBlocks
from tests.captured_graph import CapturedGraphs
from tests.vae.oracle import oracle, runtime_weights, small_config

FLOAT64, SEEN = 1e-12, 1e-6


def stages(*layers: int, attention_from: int) -> tuple[VAEStageConfig, ...]:
    return tuple(
        VAEStageConfig(16, "EfficientViTBlock" if index >= attention_from else "ResBlock", count, (3,))
        for index, count in enumerate(layers)
    )


def autoencoder(config: VAEConfig, tiles: int, dtype: torch.dtype = torch.float64) -> Autoencoder:
    model = oracle(config).to(dtype)
    return Autoencoder(config, runtime_weights(config, model, dtype), tiles=tiles)


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1), dtype=dtype) * 2 - 1


def relative_l2(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@st.composite
def configs(draw: st.DrawFn) -> VAEConfig:
    """Attention in none of the stages, in the coarsest ones, or in all; the finest may have no layers."""
    layers = draw(st.sampled_from([(2, 1, 1), (0, 1, 2), (1, 2), (1,)]))
    attention = draw(st.integers(0, len(layers)))
    found = stages(*layers, attention_from=attention)
    return small_config(
        encoder_stages=found,
        decoder_stages=found,
        downsample=draw(st.sampled_from(["Conv", "pixel_unshuffle"])),
        upsample=draw(st.sampled_from(["interpolate", "pixel_shuffle"])),
    )


@settings(max_examples=25, deadline=None, derandomize=True)
@given(config=configs(), tiles=st.integers(2, 5), height=st.integers(1, 9), width=st.integers(1, 9))
def test_tiles_are_the_whole(config: VAEConfig, tiles: int, height: int, width: int) -> None:
    whole, tiled = autoencoder(config, 1), autoencoder(config, tiles)
    latent = random(1, config.latent_channels, height, width)
    assert relative_l2(tiled.decode(latent), whole.decode(latent)) < FLOAT64
    pixels = random(1, 3, height * config.compression, width * config.compression)
    assert relative_l2(tiled.encode(pixels), whole.encode(pixels)) < FLOAT64


@pytest.mark.parametrize("upsample", ["interpolate", "pixel_shuffle"])
@pytest.mark.parametrize("downsample", ["Conv", "pixel_unshuffle"])
def test_a_narrower_margin_shows(upsample: str, downsample: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The margins are as wide as they must be, not wider: with a cell less each half differs."""
    found = stages(1, 1, 1, attention_from=2)
    config = small_config(
        encoder_stages=found, decoder_stages=found, downsample=downsample, upsample=upsample
    )
    whole = autoencoder(config, 1)
    latent, pixels = random(1, config.latent_channels, 9, 9), random(1, 3, 36, 36)
    widest = tiling._margin
    monkeypatch.setattr(tiling, "_margin", lambda *arguments: widest(*arguments) - 1)
    tiled = autoencoder(config, 2)
    assert relative_l2(tiled.decode(latent), whole.decode(latent)) > SEEN
    assert relative_l2(tiled.encode(pixels), whole.encode(pixels)) > SEEN


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_tile_is_the_whole_bit_for_bit(dtype: torch.dtype) -> None:
    found = stages(1, 1, 1, attention_from=2)
    config = small_config(encoder_stages=found, decoder_stages=found)
    whole, tiled = autoencoder(config, 1, dtype), autoencoder(config, 2, dtype)
    for blocks in (*tiled._decoder, *tiled._encoder):
        if isinstance(blocks, TiledBlocks):
            blocks._tiles = 1
    latent, pixels = random(1, config.latent_channels, 5, 3), random(1, 3, 20, 12)
    assert torch.equal(tiled.decode(latent.float()), whole.decode(latent.float()))
    assert torch.equal(tiled.encode(pixels.float()), whole.encode(pixels.float()))


def test_tiles_of_the_published_geometry() -> None:
    """Seven of the 128 cells of a side around a tile; three stages of the six are tiled, either way."""
    found = tuple(
        VAEStageConfig(32, "EfficientViTBlock" if index >= 3 else "ResBlock", 3, (5,) * (index >= 3))
        for index in range(6)
    )
    config = small_config(encoder_stages=found, decoder_stages=found)
    tiled = autoencoder(config, 2, torch.float32)
    decoder, encoder = tiled._decoder[-1], tiled._encoder[0]
    assert isinstance(decoder, TiledBlocks)
    assert isinstance(encoder, TiledBlocks)
    assert (decoder.margin, encoder.margin) == (7, 7)


def test_a_tile_is_let_go_once_the_first_block_has_read_it() -> None:
    tiles: list[weakref.ref[Tensor]] = []

    class First(Block):
        def __call__(self, x: Tensor) -> Tensor:
            tiles.append(weakref.ref(x))
            return x + 1

    class Second(Block):
        def __call__(self, x: Tensor) -> Tensor:
            assert tiles[-1]() is None
            return x

    TiledBlocks([First(), Second()], 2)(torch.zeros(1, 8, 8, 3))
    assert len(tiles) == 4


def test_tiles_can_be_recorded() -> None:
    found = stages(1, 1, attention_from=1)
    config = small_config(encoder_stages=found, decoder_stages=found)
    weights = runtime_weights(config, oracle(config), torch.float32)
    graphs = CapturedGraphs()
    replayed = Autoencoder(config, weights, GraphRunner(graphs), tiles=2)
    replayed.capture_decode(4, 4)
    latent = random(1, config.latent_channels, 4, 4, dtype=torch.float32)
    assert torch.equal(replayed.decode(latent), Autoencoder(config, weights, tiles=2).decode(latent))
    assert graphs.replayed == 1


def test_the_switch_draws_the_same_image_and_says_so(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "tiny", preset("tiny", EditConfig(use_und_image_vae=True)), seed=1)
    whole = Pipeline.load(tmp_path / "tiny", device="cpu", dtype="fp32")
    tiled = Pipeline.load(
        tmp_path / "tiny", device="cpu", dtype="fp32", tier="fast", switches={"vae_tiles": "2"}
    )
    found, expected = (pipe.generate("a circle", seed=3, steps=2) for pipe in (tiled, whole))
    levels = [np.asarray(result[0]).astype(int) for result in (found, expected)]
    assert np.abs(levels[0] - levels[1]).max() <= 1  # of 255: rounding may tip a level
    assert found.report.switches == {"vae_tiles": "2"}


@pytest.mark.parametrize("value", ["0", "17", "two"])
def test_another_number_of_tiles_is_refused(value: str) -> None:
    with pytest.raises(ParameterError, match=r"switch vae_tiles is .*accepted is a whole number from 1"):
        check_tier("fast", {"vae_tiles": value})
