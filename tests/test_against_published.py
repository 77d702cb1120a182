"""The whole pipeline against the published way of running the same random checkpoint, in float32.

Every way of looking at a reference image, alone and together, on several geometries. `make test` runs QUICK,
which reach every stage and geometry; the other cases are exhaustive. Bound: 1e-5 relative
L2 for hidden states and latents. The oracle's own float32 is within 5e-6 of its float64 here (asserted), and
the runtime's sums in another order are as far away again; a formula that is wrong is off by 1e-3.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from blip3o_rt.config import EditConfig, ModelConfig
from blip3o_rt.measure.baselines.measure import relative_l2
from blip3o_rt.measure.baselines.published import PublishedModel, Reference, levels
from blip3o_rt.measure.random_checkpoint import preset, write_random_checkpoint
from blip3o_rt.pipeline import Pipeline
from blip3o_rt.result import Plan
from tests.measure.baselines.geometries import large_patches, tied_head

PROMPT = "a red circle, 2 boxes"
BOUND = 1e-5
ROUNDING = 5e-6
CROSS = EditConfig(use_und_image_vae=True)
NOISE = EditConfig(use_und_image_vae_as_noise=True)
FEATURES = EditConfig(use_tar_siglip_features=True)
CROSS_AND_NOISE = EditConfig(use_und_image_vae=True, use_und_image_vae_as_noise=True)
EVERYTHING = EditConfig(True, True, True)
# A scheduler folder as published: its flow_shift is not the shift of this schedule.
PUBLISHED_SCHEDULER = {
    "_class_name": "DPMSolverMultistepScheduler",
    "flow_shift": 3.0,
    "num_train_timesteps": 1000,
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
}


# Tensors whose outputs go to a norm: made small, the epsilon of every norm counts.
BEFORE_NORMS = (
    "embed_tokens.",
    "q_proj.",
    "k_proj.",
    "to_q.",
    "to_k.",
    "to_out.weight",
    "connector.2.",
    "linear_2.",
    "patch_embed.proj.",
    "patch_embedding.",
    "position_embedding.",
    "conv2.",
    "conv_point.",
)


@dataclass(frozen=True)
class Case:
    """A checkpoint and a request; `images` are the sizes (width, height) of the reference images.

    A quiet checkpoint's activations are small before the norms.
    """

    config: ModelConfig
    images: tuple[tuple[int, int], ...] = ()
    image_tokens_only: bool = True
    steps: int = 3
    guidance: float = 2.0
    scheduler: dict[str, Any] | None = None
    written: dict[str, Any] = field(default_factory=dict)
    quiet: bool = False


CASES = {
    "text": Case(preset("tiny"), scheduler=PUBLISHED_SCHEDULER, steps=4),
    "text, whole vocabulary": Case(
        preset("tiny"), image_tokens_only=False, guidance=4.5, written={"seed": 1}
    ),
    "text, no vision tower": Case(preset("tiny"), steps=1, written={"tower": "none", "dtype": "bf16"}),
    "text, editing checkpoint": Case(preset("tiny", CROSS_AND_NOISE)),
    "edit by tokens": Case(preset("tiny"), ((100, 75),)),
    "edit, cross-attention": Case(preset("tiny", CROSS), ((75, 101),), scheduler=PUBLISHED_SCHEDULER),
    "edit, cross-attention, two images": Case(preset("tiny", CROSS), ((64, 64), (90, 50))),
    "edit, noise": Case(preset("tiny", NOISE), ((33, 20),), image_tokens_only=False),
    "edit, both": Case(preset("tiny", CROSS_AND_NOISE), ((200, 67),), steps=4, guidance=1.0),
    "edit, features": Case(preset("tiny", FEATURES), ((40, 40),), written={"tower": "file"}),
    "edit, features of two images": Case(preset("tiny", FEATURES), ((40, 40), (50, 41))),
    "edit, everything": Case(preset("tiny", EVERYTHING), ((61, 97),), written={"shards": 3}),
    "edit, channels": Case(preset("tiny", channelwise_noise=True), ((80, 70),)),
    "edit, channels and cross-attention": Case(preset("tiny", CROSS, channelwise_noise=True), ((70, 80),)),
    "text, quiet": Case(preset("tiny"), quiet=True),
    "edit, quiet": Case(preset("tiny", EVERYTHING), ((70, 70),), quiet=True),
    "text, tied head": Case(tied_head(EditConfig()), written={"tower": "file", "dtype": "bf16"}),
    "edit, tied head": Case(tied_head(CROSS_AND_NOISE), ((61, 97),), written={"tower": "file"}),
    "edit, large patches": Case(large_patches(EVERYTHING), ((99, 50),), image_tokens_only=False),
}


QUICK = {
    "text, whole vocabulary",
    "edit, cross-attention, two images",
    "edit, everything",
    "edit, channels and cross-attention",
    "edit, quiet",
    "text, tied head",
    "edit, large patches",
}


class Comparison(NamedTuple):
    """A case run by the runtime and by the oracle."""

    case: Case
    pipeline: Pipeline
    oracle: PublishedModel
    exact: PublishedModel
    images: list[Image.Image]
    plan: Plan
    noise: Tensor

    def references(self, model: PublishedModel) -> list[Reference]:
        return [model.reference(image) for image in self.images]

    def hidden(self, model: PublishedModel, token_ids: Tensor) -> Tensor:
        return model.hidden_states(model.prompt(PROMPT, self.references(model)), token_ids)

    def latent(self, model: PublishedModel) -> Tensor:
        references = self.references(model)
        condition = model.condition(self.hidden(model, self.plan.token_ids), references)
        case = self.case
        return model.latent(self.noise, condition, references, steps=case.steps, guidance=case.guidance)

    def render(self, **options: Any) -> Any:
        case = self.case
        return self.pipeline.render(
            self.plan, noise=self.noise, steps=case.steps, guidance=case.guidance, **options
        )


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small run no faster on several threads, and a busy machine runs them slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=() if name in QUICK else pytest.mark.exhaustive, id=name) for name in CASES
    ],
)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    case = CASES[request.param]
    folder = tmp_path_factory.mktemp("published") / "checkpoint"
    write_random_checkpoint(folder, case.config, **{"dtype": "fp32", **case.written})
    if case.quiet:
        quieten(folder / "model.safetensors")
    if case.scheduler is not None:
        (folder / "sana/scheduler/scheduler_config.json").write_text(json.dumps(case.scheduler))
    pipeline = Pipeline.load(folder, device="cpu", dtype="fp32")
    oracle = PublishedModel(folder)
    images = [image(*size, seed=seed) for seed, size in enumerate(case.images)]
    plan = pipeline.plan(PROMPT, image=images or None, top_k=1, image_tokens_only=case.image_tokens_only)
    shape = (1, oracle.latent_channels, oracle.latent_size, oracle.latent_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return Comparison(case, pipeline, oracle, PublishedModel(folder, torch.float64), images, plan, noise)


def quieten(file: Path) -> None:
    weights = load_file(file)
    for name, tensor in weights.items():
        if any(part in name for part in BEFORE_NORMS):
            tensor *= 0.01
    save_file(weights, file)


def image(width: int, height: int, seed: int) -> Image.Image:
    """A smooth random image."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def test_greedy_tokens(run: Comparison) -> None:
    prompt = run.oracle.prompt(PROMPT, run.references(run.oracle))
    assert torch.equal(run.plan.prompt_ids, prompt.ids)
    expected = run.oracle.greedy_tokens(prompt, image_tokens_only=run.case.image_tokens_only)
    assert torch.equal(run.plan.token_ids, expected)


def test_hidden_states(run: Comparison) -> None:
    assert relative_l2(run.plan.hidden_states, run.hidden(run.oracle, run.plan.token_ids)) < BOUND


def test_hidden_states_of_replayed_tokens(run: Comparison) -> None:
    """Any tokens of the vocabulary, as greedy ones repeat themselves."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = run.oracle.config["vocab_size"]
    tokens = torch.randint(vocabulary, run.plan.token_ids.shape, generator=generator)
    plan = run.pipeline.plan(PROMPT, image=run.images or None, token_ids=tokens)
    assert torch.equal(plan.token_ids, tokens)
    assert relative_l2(plan.hidden_states, run.hidden(run.oracle, tokens)) < BOUND


def test_reference_latents(run: Comparison) -> None:
    looks = run.case.config.edit.use_und_image_vae or run.case.config.edit.use_und_image_vae_as_noise
    expected = run.references(run.oracle) if looks else []
    assert len(run.plan.reference_latents) == len(expected)
    for found, reference in zip(run.plan.reference_latents, expected, strict=True):
        assert relative_l2(found, reference.latent) < BOUND


def test_latent(run: Comparison) -> None:
    assert relative_l2(run.render(output="latent"), run.latent(run.oracle)) < BOUND


def test_image(run: Comparison) -> None:
    """Within one gray level everywhere."""
    expected = levels(run.oracle.decode(run.latent(run.oracle))).astype(int)
    found = np.asarray(run.render()).astype(int)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1


def test_the_bound_is_above_rounding(run: Comparison) -> None:
    """The oracle's float32 is within ROUNDING of its float64, so BOUND asks for the same mathematics."""
    tokens = run.plan.token_ids
    assert relative_l2(run.hidden(run.oracle, tokens), run.hidden(run.exact, tokens)) < ROUNDING
    assert relative_l2(run.latent(run.oracle), run.latent(run.exact)) < ROUNDING
