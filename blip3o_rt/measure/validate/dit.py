"""The connectors and the diffusion transformer against diffusers: condition, predictions, every latent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blip3o_rt.checkpoint.load import Checkpoint
from blip3o_rt.connector.model import Connector
from blip3o_rt.dit.conditioning import ConditionTokens, condition_tokens
from blip3o_rt.dit.denoise import Denoising
from blip3o_rt.dit.model import DiT
from blip3o_rt.dit.schedule import flow_schedule
from blip3o_rt.dit.step import EagerSteps, StepState
from blip3o_rt.machine import exact_arithmetic
from blip3o_rt.measure.baselines.measure import relative_l2
from blip3o_rt.measure.baselines.published import Reference, Step
from blip3o_rt.measure.validate.bounds import BF16_RATIO, FP32_BOUND, WHY_FP32, tensor_line, why_bf16
from blip3o_rt.measure.validate.line import Line, at_most, severity
from blip3o_rt.measure.validate.subject import Subject
from blip3o_rt.params import DiffusionParams

GUIDANCE = DiffusionParams().guidance


@dataclass(frozen=True)
class Denoised:
    """What one model makes of a noise: condition tokens [n, width], the prediction [2, C, H, W] at the first
    and the last of the given steps, and the latents [1, C, h, w] after every step."""

    condition: Tensor
    predictions: list[Tensor]
    latents: list[Tensor]


def dit_lines(subject: Subject, dtypes: Sequence[str]) -> Iterator[Line]:
    """Text to image and editing, each as far as the checkpoint does it."""
    for mode in ("text", "edit"):
        if subject.draws_from_text if mode == "text" else subject.edits:
            references = subject.references() if mode == "edit" else []
            yield from _mode_lines(subject, dtypes, mode, references)


def _mode_lines(
    subject: Subject, dtypes: Sequence[str], mode: str, references: list[Reference]
) -> Iterator[Line]:
    exact, steps = _published(subject, "fp32", references, None)
    yardstick = _published(subject, "bf16", references, steps)[0] if "bf16" in dtypes else None
    for dtype in dtypes:
        found = _ours(subject, dtype, references, steps)
        rounded = yardstick if dtype == "bf16" else None
        other = rounded.condition if rounded else None
        yield tensor_line("dit", f"{mode}: connector", dtype, found.condition, exact.condition, other)
        for index, step in enumerate((1, len(steps))):
            other = rounded.predictions[index] if rounded else None
            name = f"{mode}: prediction, step {step} of {len(steps)}"
            yield tensor_line("dit", name, dtype, found.predictions[index], exact.predictions[index], other)
        yield _latents_line(mode, dtype, found.latents, exact.latents, rounded.latents if rounded else None)


def _latents_line(
    mode: str, dtype: str, found: list[Tensor], exact: list[Tensor], published: list[Tensor] | None
) -> Line:
    """The latent after the step that is furthest from the published one, in bounds."""
    errors = [relative_l2(f.cpu(), e.cpu()) for f, e in zip(found, exact, strict=True)]
    bounds, yardsticks = [FP32_BOUND] * len(errors), [0.0] * len(errors)
    if published is not None:
        yardsticks = [relative_l2(p.cpu(), e.cpu()) for p, e in zip(published, exact, strict=True)]
        bounds = [BF16_RATIO * yardstick for yardstick in yardsticks]
    worst = max(range(len(errors)), key=lambda index: severity(errors[index], bounds[index]))
    each = ", ".join(f"{error:.1e}" for error in errors)
    name, why = f"{mode}: latents after each step", WHY_FP32 if published is None else why_bf16()
    known = None if published is None else yardsticks[worst]
    detail = f"worst of {len(errors)} steps: {worst + 1}; each: {each}"
    rest: dict[str, Any] = {"why": why, "reference_error": known, "detail": detail}
    return at_most("dit", name, dtype, "relative L2", errors[worst], bounds[worst], **rest)


def _published(
    subject: Subject, dtype: str, references: list[Reference], steps: list[Step] | None
) -> tuple[Denoised, list[Step]]:
    """The published model's results; predictions at the given steps, or at its own (which are returned)."""
    model = subject.published(dtype)
    condition = model.condition(subject.hidden, references)
    loop = list(
        model.denoise(subject.noise, condition, references, steps=subject.scope.steps, guidance=GUIDANCE)
    )
    latents = [latent.clone() for _, latent in loop]
    if steps is None:
        steps = [step for step, _ in loop]
        predictions = [steps[0].prediction, steps[-1].prediction]
    else:
        predictions = [model.predict(s.model_input, s.timestep, condition) for s in (steps[0], steps[-1])]
    null, conditional = condition
    distinct = torch.cat([conditional, null[:1], *([null[-1:]] if subject.looks(references) else [])])
    return Denoised(distinct, predictions, latents), steps


def condition_of(checkpoint: Checkpoint, hidden: Tensor, latent: Tensor | None) -> ConditionTokens:
    """Our condition of hidden states [T + 1, hidden], and of a reference's latent where it is seen."""
    weights, device = checkpoint.weights["connector"], checkpoint.device
    of_latent = None if latent is None else Connector(weights, "und_image_vae_connector")
    latent = None if latent is None else latent.to(device)
    return condition_tokens(hidden.to(device), Connector(weights, "diffusion_connector"), latent, of_latent)


def _ours(subject: Subject, dtype: str, references: list[Reference], steps: list[Step]) -> Denoised:
    checkpoint = subject.ours(dtype, "connector", "dit")
    config, weights = checkpoint.config, checkpoint.weights
    latent = references[0].latent if references else None
    looks = subject.looks(references)
    with exact_arithmetic(subject.device):
        tokens = condition_of(checkpoint, subject.hidden[0], latent if looks else None)
        dit = DiT(config.dit, weights["dit"])
        condition = dit.condition(tokens)
        tables = dit.schedule_tables(flow_schedule(config.scheduler, len(steps)))
        predictions = [
            dit.predict(steps[index].model_input[:1], tables.step(index), condition)
            for index in (0, len(steps) - 1)
        ]
        latents, beside = [], latent if subject.lays_beside else None
        state = StepState.begin(dit, subject.noise, tables, condition, GUIDANCE, beside)
        denoising = Denoising(EagerSteps(dit), state, tables)
        while denoising.done < denoising.total:
            denoising.step()
            latents.append(denoising.latent)
    return Denoised(torch.cat([tokens.conditional, tokens.null]), predictions, latents)
