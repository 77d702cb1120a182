"""Recorded functions: the stages that are one call replay it, and say so where they cannot."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from blip3o_rt.graphs import CapturedFunction, GraphRunner
from blip3o_rt.tatok.model import ImageTokenizer
from blip3o_rt.vae.model import Autoencoder
from tests.captured_graph import CapturedGraphs
from tests.tatok import oracle as tower
from tests.vae import oracle as autoencoder


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_results_are_the_callers_own() -> None:
    graphs = CapturedGraphs()
    function = CapturedFunction("double", lambda x: (2 * x, x + 1), GraphRunner(graphs))
    function.capture(torch.empty(3))
    first, second = function(torch.ones(3)), function(torch.full((3,), 5.0))
    assert torch.equal(first[0], torch.full((3,), 2.0))
    assert torch.equal(second[1], torch.full((3,), 6.0))
    assert graphs.replayed == 2


def test_shapes_that_were_not_prepared_run_and_are_told() -> None:
    graphs = CapturedGraphs()
    runner = GraphRunner(graphs)
    function = CapturedFunction("double", lambda x: 2 * x, runner)
    function.capture(torch.empty(3))
    assert torch.equal(function(torch.ones(4)), torch.full((4,), 2.0))
    assert graphs.replayed == 0
    assert runner.eager == {"double of [4]"}


def test_without_graphs_the_function_runs_and_nothing_is_told() -> None:
    calls = []
    runner = GraphRunner(None)
    function = CapturedFunction("double", lambda x: calls.append(x) or 2 * x, runner)
    function.capture(torch.empty(3))
    assert len(calls) == 1  # compiles what there is to compile
    given = torch.ones(3)
    assert torch.equal(function(given), 2 * given)
    assert calls[1] is given
    assert runner.eager == set()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("resampling", [("interpolate", "Conv"), ("pixel_shuffle", "pixel_unshuffle")])
def test_the_autoencoder_replayed_is_the_autoencoder(dtype: torch.dtype, resampling: tuple[str, str]) -> None:
    config = autoencoder.small_config(upsample=resampling[0], downsample=resampling[1])
    weights = autoencoder.runtime_weights(config, autoencoder.oracle(config), dtype)
    graphs = CapturedGraphs()
    runner = GraphRunner(graphs)
    eager, replayed = Autoencoder(config, weights), Autoencoder(config, weights, runner)
    side = config.compression
    replayed.capture_decode(3, 5)
    replayed.capture_encode(3 * side, 5 * side)
    latents = random(2, config.latent_channels, 3, 5)
    pixels = random(2, 3, 3 * side, 5 * side).clamp(-1, 1)
    assert torch.equal(replayed.decode(latents), eager.decode(latents))
    assert torch.equal(replayed.encode(pixels), eager.encode(pixels))
    assert (graphs.captured, graphs.replayed) == (2, 4)
    assert runner.eager == set()
    assert torch.equal(replayed.decode(latents[..., :4]), eager.decode(latents[..., :4]))
    assert runner.eager == {f"vae.decode of [1, {config.latent_channels}, 3, 4]"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_image_tokenizer_replayed_is_the_image_tokenizer(dtype: torch.dtype) -> None:
    config = tower.small_config()
    weights = tower.runtime_weights(config, tower.oracle(config), dtype)
    graphs = CapturedGraphs()
    eager, replayed = ImageTokenizer(config, weights), ImageTokenizer(config, weights, GraphRunner(graphs))
    replayed.capture()
    pixels = random(2, config.image_channels, config.image_size, config.image_size).clamp(-1, 1)
    for found, expected in zip(replayed.encode(pixels), eager.encode(pixels), strict=True):
        assert torch.equal(found, expected)
    assert (graphs.captured, graphs.replayed) == (1, 2)
