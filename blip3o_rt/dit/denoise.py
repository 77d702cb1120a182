"""The denoising loop: from noise to a latent in the schedule's Euler steps, with guidance."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from blip3o_rt import trace
from blip3o_rt.dit.conditioning import Condition
from blip3o_rt.dit.model import DiT, ScheduleTables
from blip3o_rt.dit.recorded import RecordedPicture
from blip3o_rt.dit.step import Steps, StepState

StepCallback = Callable[[int, int], None]  # steps done, steps in all; raises to cancel


def denoise(
    dit: DiT,
    noise: Tensor,
    tables: ScheduleTables,
    condition: Condition,
    guidance_scale: float,
    *,
    reference_latent: Tensor | None = None,
    recorded: RecordedPicture | None = None,
    callback: StepCallback | None = None,
) -> Tensor:
    """The latent [1, C, H, W] in fp32 that the noise [1, C, H, W] becomes (still times the scaling factor).

    reference_latent [1, C, H, W'] is what an edit lays beside the noise, see `model_input`. `recorded` holds
    steps recorded for this geometry, whose condition is the one given. The callback runs after every step;
    whatever it raises (Cancelled) ends the loop. Raises ParameterError for shapes that do not fit.
    """
    if recorded is None:
        steps = Steps(dit, StepState.begin(dit, noise, tables, condition, guidance_scale, reference_latent))
    else:
        steps = recorded.begin(noise, tables, guidance_scale, reference_latent)
    count = tables.schedule.steps
    for step in range(count):
        with trace.span("dit.step", step):
            steps()
        if callback is not None:
            callback(step + 1, count)
    return steps.state.latent.clone(memory_format=torch.contiguous_format)
