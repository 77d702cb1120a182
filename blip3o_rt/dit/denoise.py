"""The denoising loop: from noise to a latent in the schedule's Euler steps, with guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from blip3o_rt import trace
from blip3o_rt.dit.captured import CapturedImage
from blip3o_rt.dit.conditioning import Condition
from blip3o_rt.dit.model import DiT, ScheduleTables
from blip3o_rt.dit.step import StepKind, Steps, StepState, guided_step
from blip3o_rt.graphs import RunAhead

StepCallback = Callable[[int, int], None]  # steps done, steps in all; raises to cancel
STEPS_AHEAD = 4  # queued on a GPU at most: what a cancelled image still waits for


class Denoising:
    """The denoising of one image, a step at a time, so that other work can run between two steps.

    Args:
        steps: The steps of the image, before its first one.
        tables: The schedule's modulation tables.
        kinds: How each step is made; None for guided Euler steps only.
    """

    def __init__(self, steps: Steps, tables: ScheduleTables, kinds: Sequence[StepKind] | None = None) -> None:
        self.total = tables.schedule.steps
        self.done = 0
        self._steps = steps
        self._sigmas = tables.schedule.sigmas
        self._kinds = kinds or [guided_step] * self.total
        self._ahead = RunAhead(steps.dit.device, STEPS_AHEAD)

    def step(self) -> None:
        """Make the next step."""
        self._ahead.step()
        with trace.span("dit.step", self.done):
            self._steps(self._kinds[self.done])
        self.done += 1

    def step_and_estimate(self) -> Tensor:
        """Make the next step; returns the estimate of the clean latent [1, C, h, w] on which it was made."""
        before = self.latent
        self.step()
        here, after = self._sigmas[self.done - 1], self._sigmas[self.done]
        return before + (self.latent - before) * (here / (here - after))

    @property
    def latent(self) -> Tensor:
        """A copy of the latent [1, C, h, w], fp32, as the steps so far have left it."""
        return self._steps.state.latent.clone(memory_format=torch.contiguous_format)


def denoise(
    dit: DiT,
    noise: Tensor,
    tables: ScheduleTables,
    condition: Condition,
    guidance_scale: float,
    *,
    reference_latent: Tensor | None = None,
    kinds: Sequence[StepKind] | None = None,
    captured: CapturedImage | None = None,
    callback: StepCallback | None = None,
) -> Tensor:
    """The latent [1, C, H, W] in fp32 that the noise [1, C, H, W] becomes (still times the scaling factor).

    reference_latent [1, C, H, W'] is what an edit lays beside the noise, see `model_input`. `kinds`
    says how each step is made, all of them guided Euler steps where it is None (`Shortcuts` has others).
    `captured` holds steps captured for this geometry, whose condition is the one given. The callback runs
    after every step; whatever it raises (Cancelled) ends the loop. Raises ParameterError for shapes that do
    not fit.
    """
    if captured is None:
        steps = Steps(dit, StepState.begin(dit, noise, tables, condition, guidance_scale, reference_latent))
    else:
        steps = captured.begin(noise, tables, guidance_scale, reference_latent)
    denoising = Denoising(steps, tables, kinds)
    while denoising.done < denoising.total:
        denoising.step()
        if callback is not None:
            callback(denoising.done, denoising.total)
    return denoising.latent
