"""Rollouts against transformers' forward pass and logits processors, and against single requests.

Raw log-probabilities are within 1e-4 in float32: logits of two implementations differ by about 1e-5 here, and
a wrong position, temperature or vocabulary is off by 1e-2 or more.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from blip3o_rt.ar.log_probs import kept_logits
from blip3o_rt.embedded import embedded_checkpoint
from blip3o_rt.errors import Cancelled, GenerationError, ImageError, ParameterError, PromptError
from blip3o_rt.params import SAMPLING_NAMES, SamplingParams
from blip3o_rt.pipeline import Pipeline, renderer
from blip3o_rt.result import Progress
from blip3o_rt.rl.rollout import Rollout
from tests.rl import oracle

PROMPTS = ["a red circle on a blue background", "a small green square"]
TOLERANCE = 1e-4
STEPS = 2


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline.load(device="cpu", dtype="fp32", max_batch=3)


@pytest.fixture(scope="module")
def decoder() -> object:
    return oracle.decoder_of(embedded_checkpoint())


@pytest.fixture(scope="module")
def reference(pipeline: Pipeline) -> Image.Image:
    return pipeline.generate(PROMPTS[0], steps=STEPS)[0]


def levels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).transpose(2, 0, 1)


SAMPLINGS = [
    {},
    {"temperature": 0.7, "top_k": 12, "top_p": 0.8},
    {"temperature": 1.5, "top_k": 0, "top_p": 1.0},
    {"temperature": 1.2, "top_k": 0, "top_p": 0.6},
    {"temperature": 1.3, "top_k": 40, "top_p": 0.9, "image_tokens_only": False},
]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_log_probs_are_those_of_transformers(
    pipeline: Pipeline, decoder: object, sampling: dict[str, float]
) -> None:
    image_tokens = pipeline.config.image_tokens
    params = SamplingParams(**sampling)
    drawn_from = image_tokens.image_token_range if params.image_tokens_only else range(2**31)
    top_k = params.top_k_for(image_tokens.num_image_tokens, pipeline.config.ar.vocab_size)
    for rollout in pipeline.rollout(PROMPTS, 2, 5, images=False, **sampling):
        rows = oracle.logits(decoder, rollout.prompt_ids, rollout.token_ids)
        raw = oracle.raw_log_probs(rows, rollout.token_ids)
        assert torch.allclose(rollout.logprobs.double(), raw, rtol=0, atol=TOLERANCE)
        processed = oracle.processed_log_probs(
            rows[:, drawn_from.start : drawn_from.stop],
            rollout.token_ids - drawn_from.start,
            temperature=params.temperature,
            top_k=top_k,
            top_p=params.top_p,
        )
        # Where sums end within a rounding of top_p the two may keep one token more or less: its mass
        # then shows in every log-probability of the position.
        close = (rollout.processed_logprobs.double() - processed).abs() <= TOLERANCE
        assert close.float().mean() > 0.99


WIDE: dict[str, float] = {"seed": 5, "temperature": 3.0, "top_k": 0, "top_p": 1.0}
OTHER: dict[str, float] = {"temperature": 0.1, "top_k": 2, "top_p": 0.2, "image_tokens_only": False}


@pytest.mark.parametrize("name", SAMPLING_NAMES)
def test_every_parameter_of_sampling_changes_tokens_and_log_probs(pipeline: Pipeline, name: str) -> None:
    """Not how it does: this is to notice one that an interface has and nothing hears of."""
    usual, other = (
        pipeline.plan(PROMPTS[0], **{**WIDE, **given})  # type: ignore[arg-type]
        for given in ({}, {name: OTHER[name]})
    )
    assert not torch.equal(usual.token_ids, other.token_ids)
    log_probs = pipeline._planner.log_probs
    _, as_usual = log_probs(dataclasses.replace(other, sampling=usual.sampling))
    _, found = log_probs(other)
    assert found.isfinite().all()
    assert not torch.equal(found, as_usual)


def test_processed_logits_are_those_of_transformers() -> None:
    """On the same logits the kept tokens and their numbers are equal, whatever the filters."""
    torch.manual_seed(0)
    rows, tokens = torch.randn(16, 300), torch.arange(16)
    for temperature, top_k, top_p in ((1.0, 0, 1.0), (0.5, 7, 0.9), (2.0, 300, 0.3), (1.0, 1, 0.95)):
        found = kept_logits(rows, temperature, top_k, top_p).log_softmax(-1)
        expected = oracle.processed_log_probs(
            rows.double(), tokens, temperature=temperature, top_k=top_k, top_p=top_p
        )
        assert torch.allclose(found.gather(1, tokens[:, None])[:, 0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("task", ["t2i", "edit"])
@pytest.mark.exhaustive
def test_log_probs_of_the_golden_checkpoints(task: str, reference_dir: Path) -> None:
    folder = reference_dir / task / "checkpoint"
    pipeline, decoder = Pipeline.load(folder, device="cpu", dtype="fp32"), oracle.decoder_of(folder)
    (rollout,) = pipeline.rollout("a red circle on a blue background", seed=3, images=False)
    rows = oracle.logits(decoder, rollout.prompt_ids, rollout.token_ids)
    raw = oracle.raw_log_probs(rows, rollout.token_ids)
    assert torch.allclose(rollout.logprobs.double(), raw, rtol=0, atol=TOLERANCE)


def test_it_is_a_flat_list_of_what_single_requests_draw(pipeline: Pipeline) -> None:
    """More samples than the batch holds, all of the first prompt first; every one as if it were alone."""
    rollouts = pipeline.rollout(PROMPTS, 4, 5, steps=STEPS, hidden_states=True)
    assert [(r.prompt, r.seed) for r in rollouts] == [(p, s) for p in PROMPTS for s in (5, 6, 7, 8)]
    for rollout in (rollouts[0], rollouts[3], rollouts[7]):
        (image,) = (result := pipeline.generate(rollout.prompt, seed=rollout.seed, steps=STEPS))
        assert torch.equal(rollout.token_ids, result.plans[0].token_ids[0])
        assert torch.equal(rollout.prompt_ids, result.plans[0].prompt_ids[0])
        assert torch.equal(rollout.hidden_states, result.plans[0].hidden_states[0])
        assert rollout.image.dtype == torch.uint8
        assert np.array_equal(rollout.image.numpy(), levels(image))
    assert rollouts.report.stage("denoise").work == 8 * STEPS


def test_n_samples_are_n_requests(pipeline: Pipeline) -> None:
    together = pipeline.rollout(PROMPTS[0], 3, 9, images=False, hidden_states=True)
    alone = [pipeline.rollout(PROMPTS[0], 1, 9 + i, images=False, hidden_states=True)[0] for i in range(3)]
    for one, other in zip(together, alone, strict=True):
        for field in dataclasses.fields(Rollout):
            found, expected = getattr(one, field.name), getattr(other, field.name)
            same = torch.equal(found, expected) if isinstance(found, torch.Tensor) else found == expected
            assert same, field.name


def test_rollouts_of_edits_and_of_text_share_a_batch(pipeline: Pipeline, reference: Image.Image) -> None:
    prompts = ["make the circle green", PROMPTS[0]]
    rollouts = pipeline.rollout(prompts, 2, 1, references=[reference, None], steps=STEPS)
    edited = pipeline.edit(prompts[0], reference, n=2, seed=1, steps=STEPS)
    drawn = pipeline.generate(prompts[1], n=2, seed=1, steps=STEPS)
    for rollout, image in zip(rollouts, [*edited, *drawn], strict=True):
        assert np.array_equal(rollout.image.numpy(), levels(image))


def test_what_is_not_asked_for_is_not_there(pipeline: Pipeline) -> None:
    (rollout,) = pipeline.rollout(PROMPTS[0], images=False)
    assert rollout.image is None
    assert rollout.hidden_states is None
    assert rollout.weights_version == 0


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"prompts": []}, PromptError),
        ({"prompts": ["a", " "]}, PromptError),
        ({"prompts": ["a"], "n": 0}, ParameterError),
        ({"prompts": ["a"], "seed": -1}, ParameterError),
        ({"prompts": ["a"], "images": 1}, ParameterError),
        ({"prompts": ["a"], "hidden_states": "yes"}, ParameterError),
        ({"prompts": ["a", "b"], "references": ["one.png"]}, ImageError),
        ({"prompts": ["a"], "steps": 0}, ParameterError),
        ({"prompts": ["a"], "top_k": 2**30}, ParameterError),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(
    pipeline: Pipeline, arguments: dict[str, object], error: type[Exception]
) -> None:
    told: list[object] = []
    with pytest.raises(error):
        pipeline.rollout(**{"callback": told.append, **arguments})
    assert not told


def test_it_is_cancelled_between_two_tokens(pipeline: Pipeline) -> None:
    with pytest.raises(Cancelled):
        pipeline.rollout(PROMPTS, 2, images=False, callback=lambda progress: progress.done < 5)
    assert not pipeline._planner.engine.busy


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_images_share_steps_with_the_bits_of_single_calls(
    dtype: str, reference: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six images, of an edit and of text, four to a step; cancelled between two steps, then drawn again."""
    pipeline = Pipeline.load(device="cpu", dtype=dtype)
    shared, real = list[int](), renderer.step_together
    monkeypatch.setattr(renderer, "step_together", lambda images: shared.append(len(images)) or real(images))
    prompts, references = ["make it green", PROMPTS[0]], [reference, None]
    draw = partial(pipeline.rollout, steps=3, top_k=0, top_p=1.0)
    told: list[tuple[int, int]] = []

    def cancel(progress: Progress) -> bool:
        told.extend([(progress.done, progress.total)] if progress.stage == "denoise" else [])
        return (8, 12) not in told

    with pytest.raises(Cancelled):
        draw(prompts, 3, references=references, callback=cancel)
    assert told == [(4, 12), (8, 12)]
    shared.clear()
    together = draw(prompts, 3, references=references)
    assert shared == [4] * 3 + [2] * 3
    for number, found in enumerate(together):
        kind, seed = divmod(number, 3)
        (alone,) = draw(prompts[kind], 1, seed, references=references[kind : kind + 1])
        assert torch.equal(found.image, alone.image)
        assert torch.equal(found.logprobs, alone.logprobs)


def test_numbers_that_are_not_finite_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = Pipeline.load(device="cpu", dtype="fp32")
    decoder = pipeline._planner.engine.decoder
    monkeypatch.setattr(decoder, "final_norm", torch.full_like(decoder.final_norm, torch.nan))
    with pytest.raises(GenerationError):
        pipeline.rollout(PROMPTS[0], images=False)
