"""The denoising loop: from noise to a latent in the schedule's Euler steps, with guidance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from blip3o_rt import trace
from blip3o_rt.dit.model import ScheduleTables
from blip3o_rt.dit.step import StepKind, Steps, StepState, guided_step
from blip3o_rt.graphs import RunAhead

STEPS_AHEAD = 4  # queued on a GPU at most: what a cancelled image still waits for


class Denoising:
    """The denoising of one image, a step at a time, so that other work can run between two steps.

    Args:
        steps: Runs or replays its steps.
        state: What they read and write, before the first one.
        tables: The schedule's modulation tables.
        kinds: How each step is made; None for guided Euler steps only.
    """

    def __init__(
        self, steps: Steps, state: StepState, tables: ScheduleTables, kinds: Sequence[StepKind] | None = None
    ) -> None:
        self.total = tables.schedule.steps
        self.done = 0
        self._steps, self._state = steps, state
        self._sigmas = tables.schedule.sigmas
        self._kinds = kinds or [guided_step] * self.total
        self._before = self.latent
        self._ahead = RunAhead(state.latent.device, STEPS_AHEAD)

    def step(self) -> None:
        """Make the next step."""
        step_together([self])

    def run(self) -> Tensor:
        """Make the steps that are left; returns the latent."""
        while self.done < self.total:
            self.step()
        return self.latent

    @property
    def estimate(self) -> Tensor:
        """The estimate of the clean latent [1, C, h, w] that the last step was made on."""
        solver = self._kinds[self.done - 1].solver
        here, after = self._sigmas[self.done - 1], self._sigmas[self.done]
        return solver.estimate(self._before, self.latent, here, after, self._state.history.denoised)

    @property
    def latent(self) -> Tensor:
        """A copy of the latent [1, C, h, w], fp32, as the steps so far have left it."""
        return self._state.latent.clone(memory_format=torch.contiguous_format)


def step_together(images: Sequence[Denoising]) -> None:
    """Make the next step of each image. Those whose steps are of one kind share it, bit for bit as alone.

    Where a step raises, `done` says which images have made theirs.
    """
    alike: dict[tuple[Steps, StepKind], list[Denoising]] = {}
    for image in images:
        image._ahead.step()
        image._before.copy_(image._state.latent)
        alike.setdefault((image._steps, image._kinds[image.done]), []).append(image)
    for (steps, kind), sharing in alike.items():
        with trace.span("dit.step", sharing[0].done):
            steps(kind, [image._state for image in sharing])
        for image in sharing:
            image.done += 1
