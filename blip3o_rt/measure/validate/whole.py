"""The whole pipeline against the published one: prompt and image in, image out, drawn and edited."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blip3o_rt.measure.baselines.published import levels
from blip3o_rt.measure.validate.bounds import PIPELINE_RATIO, tensor_line
from blip3o_rt.measure.validate.images import Compared, Likeness, image_lines
from blip3o_rt.measure.validate.line import Line
from blip3o_rt.measure.validate.subject import INSTRUCTION, PROMPT, SEED, Subject
from blip3o_rt.ops.random import normal_noise
from blip3o_rt.params import DiffusionParams
from blip3o_rt.pipeline import Pipeline

GUIDANCE = DiffusionParams().guidance
TEXTS = {"text": PROMPT, "edit": INSTRUCTION}


@dataclass(frozen=True)
class Drawn:
    """An image of ours: what the decoder was given and drew, [1, P] and [1, T], and pixels [1, 3, H, W]."""

    prompt_ids: Tensor
    token_ids: Tensor
    pixels: Tensor


def pipeline_lines(subject: Subject, dtypes: Sequence[str], compared: Compared) -> Iterator[Line | str]:
    """Greedy tokens, so that the images are of one plan; the published model replays our tokens.

    A large model is run once, in bfloat16 and at its full size, with one step and random tokens replayed.
    """
    large = subject.scope.large
    if large:
        yield "pipeline: at full size with one step, random tokens replayed, text to image in bf16 only"
    for dtype in dtypes:
        if large and dtype == "fp32":
            continue
        for mode in _modes(subject):
            found = _ours(subject, dtype, mode)
            exact = _published(subject, "fp32", mode, found)
            rounded = _published(subject, "bf16", mode, found) if dtype == "bf16" else None
            yield tensor_line(
                "pipeline", f"{mode}: pixels", dtype, found.pixels, exact, rounded, ratio=PIPELINE_RATIO
            )
            expected = levels(exact)
            likeness = compared(f"pipeline {mode} {dtype}", levels(found.pixels), expected)
            known = None if rounded is None else Likeness.of(levels(rounded), expected)
            yield from image_lines("pipeline", mode, dtype, likeness, known, ratio=PIPELINE_RATIO)


def _modes(subject: Subject) -> list[str]:
    modes = ["text"] if subject.draws_from_text else []
    can_edit = subject.config.ta_tok is not None and not (subject.scope.large and modes)
    return [*modes, *(["edit"] if can_edit else [])]


def _noise(subject: Subject) -> Tensor:
    config = subject.whole_config if subject.scope.large else subject.config
    side = config.dit.sample_size
    return normal_noise(SEED, (1, config.vae.latent_channels, side, side))


def _steps(subject: Subject) -> int:
    return 1 if subject.scope.large else subject.scope.steps


def _ours(subject: Subject, dtype: str, mode: str) -> Drawn:
    large = subject.scope.large
    pipeline = Pipeline(subject.ours(dtype, whole=large), max_batch=1)
    tokens = _random_tokens(subject) if large else None
    image = subject.image if mode == "edit" else None
    plan = pipeline.plan(TEXTS[mode], image=image, top_k=1, token_ids=tokens)
    pixels = pipeline.render(
        plan, noise=_noise(subject), steps=_steps(subject), guidance=GUIDANCE, output="tensor"
    )
    return Drawn(plan.prompt_ids, plan.token_ids, torch.as_tensor(pixels))


def _random_tokens(subject: Subject) -> Tensor:
    """As many image tokens as a whole image has."""
    image_tokens = subject.whole_config.image_tokens
    codes = torch.randint(
        image_tokens.num_image_tokens,
        (1, image_tokens.tokens_per_image),
        generator=torch.Generator().manual_seed(SEED),
    )
    return image_tokens.image_token_range.start + codes


def _published(subject: Subject, dtype: str, mode: str, drawn: Drawn) -> Tensor:
    """Pixels [1, 3, H, W] of the published model from the same words, image, tokens and noise.

    An edit's prompt has our codes of the image (where it has codes): one that rounds the other way would
    change all that follows. They are compared for themselves.
    """
    model = subject.published(dtype, whole=subject.scope.large)
    references = [model.reference(subject.image)] if mode == "edit" else []
    if references and not subject.config.edit.use_tar_siglip_features:
        prompt = model.embed(drawn.prompt_ids)
    else:
        prompt = model.prompt(TEXTS[mode], references)
    hidden = model.hidden_states(prompt, drawn.token_ids)
    del prompt
    model.release()
    condition = model.condition(hidden, references)
    latent = model.latent(_noise(subject), condition, references, steps=_steps(subject), guidance=GUIDANCE)
    model.release()
    return model.decode(latent).clone()
