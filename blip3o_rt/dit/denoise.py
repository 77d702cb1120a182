"""The denoising loop: from noise to a latent in the schedule's Euler steps, with guidance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from blip3o_rt import trace
from blip3o_rt.dit.captured import CapturedImages
from blip3o_rt.dit.conditioning import Condition
from blip3o_rt.dit.model import DiT, ScheduleTables
from blip3o_rt.dit.step import EagerSteps, StepKind, Steps, StepState, guided_step
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


def denoise(
    dit: DiT,
    noise: Tensor,
    tables: ScheduleTables,
    condition: Condition,
    guidance_scale: float,
    *,
    reference_latent: Tensor | None = None,
    kinds: Sequence[StepKind] | None = None,
    captured: CapturedImages | None = None,
) -> Tensor:
    """The latent [1, C, H, W] in fp32 that the noise [1, C, H, W] becomes (still times the scaling factor).

    reference_latent [1, C, H, W'] is what an edit lays beside the noise, see `with_reference`. `kinds`
    says how each step is made, all of them guided Euler steps where it is None (`Shortcuts` has others).
    `captured`: buffers of this geometry; `condition` must be that of its first image. Raises ParameterError
    for shapes that do not fit.
    """
    if captured is None:
        state = StepState.begin(dit, noise, tables, condition, guidance_scale, reference_latent)
        denoising = Denoising(EagerSteps(dit), state, tables, kinds)
    else:
        image = captured.images[0]
        image.begin(noise, tables, guidance_scale, reference_latent)
        denoising = Denoising(captured, image.state, tables, kinds)
    while denoising.done < denoising.total:
        denoising.step()
    return denoising.latent
