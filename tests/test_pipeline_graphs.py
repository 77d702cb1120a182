"""A pipeline whose work is captured draws the images of one whose work runs, and names what was not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from blip3o_rt.checkpoint.load import load_checkpoint
from blip3o_rt.config import EditConfig
from blip3o_rt.graphs import GraphRunner
from blip3o_rt.measure.random_checkpoint import preset, write_random_checkpoint
from blip3o_rt.pipeline import Pipeline
from tests.captured_graph import CapturedGraphs

STEPS = 3
EDITS = {
    "cross-attention": EditConfig(use_und_image_vae=True),
    "beside the noise, features": EditConfig(use_und_image_vae_as_noise=True, use_tar_siglip_features=True),
    "both": EditConfig(use_und_image_vae=True, use_und_image_vae_as_noise=True),
    "tokens alone": EditConfig(),
}


class Pair:
    """The same random model twice: run as it is, and captured."""

    def __init__(self, folder: Path, edit: EditConfig) -> None:
        write_random_checkpoint(folder, preset("tiny", edit), seed=1)
        checkpoint = load_checkpoint(folder, dtype=torch.float32, device=torch.device("cpu"))
        self.graphs = CapturedGraphs()
        self.eager = Pipeline(checkpoint)
        self.captured = Pipeline(checkpoint, runner=GraphRunner(self.graphs))
        self.captured.warm_up()


@pytest.fixture(scope="module", params=EDITS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp("checkpoints") / "tiny", EDITS[request.param])


def image(width: int = 40, height: int = 30) -> Image.Image:
    gradient = np.add.outer(3 * np.arange(height), 2 * np.arange(width)) % 256
    return Image.fromarray(np.stack([gradient, 255 - gradient, gradient // 2], axis=2).astype(np.uint8))


def same(found: list[Image.Image], expected: list[Image.Image]) -> bool:
    return all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(found, expected, strict=True))


def test_text_to_image(pair: Pair) -> None:
    captured = pair.graphs.captured
    for steps in (STEPS, 2):
        options = {"n": 2, "seed": 3, "steps": steps, "draft_window": 1}
        found = pair.captured.generate("a circle", **options)
        expected = pair.eager.generate("a circle", **options)
        assert same(found, expected)
        assert found.report.not_captured == ()
        assert found.report.implementations.keys() == expected.report.implementations.keys()
    assert pair.graphs.captured == captured  # a request records nothing


def test_edits(pair: Pair) -> None:
    found = pair.captured.edit("make it green", image(), n=2, seed=4, steps=STEPS)
    assert same(found, pair.eager.edit("make it green", image(), n=2, seed=4, steps=STEPS))
    assert found.report.not_captured == ()


def test_what_the_caller_keeps_is_his_own(pair: Pair) -> None:
    plan = pair.captured.plan("a circle", seed=5)
    first = pair.captured.render(plan, steps=STEPS, output="tensor")
    kept = first.clone()
    pair.captured.render(plan, seed=6, steps=STEPS, output="tensor")
    assert torch.equal(first, kept)


def test_a_geometry_that_was_not_recorded_is_drawn_and_named(pair: Pair) -> None:
    """Two references make a longer condition than the one captured, where the condition sees them."""
    if pair.captured._renderer.sees_reference:
        pytest.skip("this checkpoint takes one reference")
    images = [image(), image(30, 40)]
    found = pair.captured.edit("make it green", images, seed=4, steps=STEPS)
    assert same(found, pair.eager.edit("make it green", images, seed=4, steps=STEPS))
    if pair.captured._renderer.takes_references:
        assert "2 references" in " ".join(found.report.not_captured)
        assert "without a graph: denoising of" in str(found.report)
