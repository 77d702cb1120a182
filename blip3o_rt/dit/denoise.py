"""The denoising loop: from noise to a latent in the schedule's Euler steps, with guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from blip3o_rt import trace
from blip3o_rt.dit.conditioning import Condition
from blip3o_rt.dit.model import DiT, ScheduleTables
from blip3o_rt.dit.recorded import RecordedPicture
from blip3o_rt.dit.step import StepKind, Steps, StepState, guided_step
from blip3o_rt.graphs import RunAhead

StepCallback = Callable[[int, int], None]  # steps done, steps in all; raises to cancel
STEPS_AHEAD = 4  # queued on a GPU at most: what a cancelled picture still waits for


def denoise(
    dit: DiT,
    noise: Tensor,
    tables: ScheduleTables,
    condition: Condition,
    guidance_scale: float,
    *,
    reference_latent: Tensor | None = None,
    kinds: Sequence[StepKind] | None = None,
    recorded: RecordedPicture | None = None,
    callback: StepCallback | None = None,
) -> Tensor:
    """The latent [1, C, H, W] in fp32 that the noise [1, C, H, W] becomes (still times the scaling factor).

    reference_latent [1, C, H, W'] is what an edit lays beside the noise, see `model_input`. `kinds`
    says how each step is made, all of them guided Euler steps where it is None (`Shortcuts` has others).
    `recorded` holds steps recorded for this geometry, whose condition is the one given. The callback runs
    after every step; whatever it raises (Cancelled) ends the loop. Raises ParameterError for shapes that do
    not fit.
    """
    if recorded is None:
        steps = Steps(dit, StepState.begin(dit, noise, tables, condition, guidance_scale, reference_latent))
    else:
        steps = recorded.begin(noise, tables, guidance_scale, reference_latent)
    count, ahead = tables.schedule.steps, RunAhead(dit.device, STEPS_AHEAD)
    for step, kind in enumerate(kinds or [guided_step] * count):
        ahead.step()
        with trace.span("dit.step", step):
            steps(kind)
        if callback is not None:
            callback(step + 1, count)
    return steps.state.latent.clone(memory_format=torch.contiguous_format)
