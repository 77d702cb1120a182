"""The trained model of the shapes through transformers and diffusers alone, and through the runtime.

In float32, text-to-image and an edit: the same prompt ids and greedy tokens, and the same image. The PSNR
asked for is 45 dB; an image whose every value is off by one grey level has 48 dB.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from blip3o_rt.measure.baselines.measure import relative_l2
from blip3o_rt.measure.baselines.published import PublishedModel, Reference, levels
from blip3o_rt.measure.shapes.render import render
from blip3o_rt.measure.shapes.scene import IMAGE_SIZE, Scene, Shape
from blip3o_rt.pipeline import Pipeline
from blip3o_rt.result import Plan

LOWEST_PSNR = 45.0  # dB
BOUND = 1e-5  # relative L2 of hidden states, as for random checkpoints (test_against_published.py)
LARGEST = 24_000_000  # bytes of model.safetensors
BEFORE = Scene("blue", (Shape("red", "circle", "large", "centre"),))
REQUESTS = {
    "text to image": ("a large red circle in the top left and a small white star on a blue background", None),
    "edit": ("make the circle green", BEFORE),
    "another edit": ("add a small yellow star in the top right corner", BEFORE),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """A model this small runs no faster on several threads, and a busy machine runs it slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pipeline(shapes_checkpoint: Path) -> Pipeline:
    return Pipeline.load(shapes_checkpoint, device="cpu", dtype="fp32")


@pytest.fixture(scope="module")
def published(shapes_checkpoint: Path) -> PublishedModel:
    return PublishedModel(shapes_checkpoint)


class Comparison(NamedTuple):
    """One request, run by the runtime (its greedy plan) and ready to be run the published way."""

    prompt: str
    image: Image.Image | None
    references: list[Reference]
    plan: Plan
    pipeline: Pipeline
    published: PublishedModel

    def published_tokens(self) -> Tensor:
        prompt = self.published.prompt(self.prompt, self.references)
        return self.published.greedy_tokens(prompt, image_tokens_only=True)

    def published_hidden(self) -> Tensor:
        prompt = self.published.prompt(self.prompt, self.references)
        return self.published.hidden_states(prompt, self.published_tokens())


@pytest.fixture(scope="module", params=REQUESTS)
def run(request: pytest.FixtureRequest, pipeline: Pipeline, published: PublishedModel) -> Comparison:
    prompt, before = REQUESTS[request.param]
    image = None if before is None else render(before)
    references = [] if image is None else [published.reference(image)]
    plan = pipeline.plan(prompt, image=image, top_k=1)
    return Comparison(prompt, image, references, plan, pipeline, published)


def test_greedy_tokens(run: Comparison) -> None:
    assert torch.equal(run.plan.prompt_ids, run.published.prompt(run.prompt, run.references).ids)
    assert torch.equal(run.plan.token_ids, run.published_tokens())


def test_hidden_states(run: Comparison) -> None:
    assert relative_l2(run.plan.hidden_states, run.published_hidden()) < BOUND


def test_image_of_thirty_steps(run: Comparison) -> None:
    shape = (1, run.published.latent_channels, run.published.latent_size, run.published.latent_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    condition = run.published.condition(run.published_hidden(), run.references)
    latent = run.published.latent(noise, condition, run.references, steps=30, guidance=2.0)
    expected = levels(run.published.decode(latent)).astype(float)
    found = np.asarray(run.pipeline.render(run.plan, noise=noise, steps=30, guidance=2.0)).astype(float)
    error = np.square(found - expected).mean()
    assert error == 0 or 10 * np.log10(255**2 / error) >= LOWEST_PSNR


def test_both_ways_of_editing_are_on(pipeline: Pipeline) -> None:
    assert pipeline.config.edit.use_und_image_vae
    assert pipeline.config.edit.use_und_image_vae_as_noise
    assert pipeline.config.ta_tok is not None
    assert pipeline.config.image_size == IMAGE_SIZE


def test_it_is_small_enough_to_ship(shapes_checkpoint: Path) -> None:
    assert (shapes_checkpoint / "model.safetensors").stat().st_size <= LARGEST


def test_it_loads_without_warnings(shapes_checkpoint: Path, recwarn: pytest.WarningsRecorder) -> None:
    Pipeline.load(shapes_checkpoint, device="cpu")
    assert [str(warning.message) for warning in recwarn] == []
