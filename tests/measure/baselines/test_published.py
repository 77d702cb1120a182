"""The oracle against what the published code computed on the two reference checkpoints, in float32.

The same library calls in the same order give the same bits on one machine with as many threads; 2e-6 relative
L2 leaves room for another order of summation (float32 itself is within 1e-6 of float64 here), and not for
another formula.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from blip3o_rt.measure.baselines.measure import relative_l2
from blip3o_rt.measure.baselines.published import Prompt, PublishedModel, Reference, levels

BOUND = 2e-6
GUIDANCE = 2.0
PROMPTS = {"t2i": "a red circle on a blue background", "edit": "make the circle green"}


class Golden(NamedTuple):
    model: PublishedModel
    references: list[Reference]
    prompt: Prompt
    condition: Tensor
    expected: dict[str, Tensor]
    image: np.ndarray

    @property
    def tokens(self) -> Tensor:
        return self.expected["gen_ids"][:, self.prompt.ids.shape[1] :]


@pytest.fixture(scope="module", params=PROMPTS)
def golden(request: pytest.FixtureRequest, reference_dir: Path) -> Golden:
    folder = reference_dir / request.param
    model = PublishedModel(folder / "checkpoint")
    expected = load_file(folder / "golden.safetensors")
    image = folder / "input.png"
    references = [model.reference(Image.open(image).convert("RGB"))] if image.exists() else []
    return Golden(
        model=model,
        references=references,
        prompt=model.prompt(PROMPTS[request.param], references),
        condition=model.condition(expected["hidden"], references),
        expected=expected,
        image=np.asarray(Image.open(folder / "golden.png")).astype(int),
    )


def test_prompt_ids(golden: Golden) -> None:
    assert torch.equal(golden.prompt.ids, golden.expected["prompt_ids"])


def test_reference(golden: Golden) -> None:
    for reference in golden.references:
        expected = golden.expected
        assert torch.equal(reference.token_ids, expected["und_tokens"])
        assert relative_l2(reference.pixels, expected["siglip_pixels"]) < BOUND
        assert relative_l2(reference.features, expected["und_feats"]) < BOUND
        assert relative_l2(reference.latent, expected["ref_latents"]) < BOUND


def test_hidden_states(golden: Golden) -> None:
    found = golden.model.hidden_states(golden.prompt, golden.tokens)
    assert relative_l2(found, golden.expected["hidden"]) < BOUND


def test_greedy_tokens_are_the_likeliest_of_the_vocabulary(golden: Golden) -> None:
    """Of the text-to-image checkpoint only: the edit's tokens were sampled."""
    if golden.references:
        assert bool((golden.tokens >= golden.model.config["image_start_token_id"]).all())
        return
    assert torch.equal(golden.model.logits(golden.expected["hidden"])[:, :-1].argmax(-1), golden.tokens)


def test_schedule(golden: Golden) -> None:
    golden.model.scheduler.set_timesteps(30, sigmas=np.linspace(1.0, 1.0 / 30, 30))
    assert torch.equal(golden.model.scheduler.timesteps, golden.expected["timesteps"])


def test_first_step(golden: Golden) -> None:
    noise, references = golden.expected["noise"], golden.references
    step, _ = next(golden.model.denoise(noise, golden.condition, references))
    assert relative_l2(step.model_input, golden.expected["first_in"]) < BOUND
    assert relative_l2(step.prediction, golden.expected["first_noise_pred"]) < BOUND


def test_last_step(golden: Golden) -> None:
    """Its input is found by undoing the published last step, from the level 1 / 30 to 0."""
    expected = golden.expected
    null, conditional = expected["last_noise_pred"].chunk(2)
    guided = (null + GUIDANCE * (conditional - null))[..., : golden.model.latent_size]
    latent = expected["latents"] + guided / 30
    model_input = torch.cat([latent, *(reference.latent for reference in golden.references)], dim=3)
    timestep = expected["timesteps"][-1]
    found = golden.model.predict(torch.cat([model_input] * 2), timestep, golden.condition)
    assert relative_l2(found, expected["last_noise_pred"]) < BOUND


def test_image(golden: Golden) -> None:
    """Within one gray level everywhere, and equal on 99.9% of the values."""
    difference = np.abs(levels(golden.model.decode(golden.expected["latents"])).astype(int) - golden.image)
    assert difference.max() <= 1
    assert (difference == 0).mean() >= 0.999
