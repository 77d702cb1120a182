"""The denoising loop: from noise to a latent in the schedule's Euler steps, with guidance."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from blip3o_rt import ops, trace
from blip3o_rt.dit.conditioning import Condition
from blip3o_rt.dit.model import DiT, ScheduleTables
from blip3o_rt.errors import ParameterError

StepCallback = Callable[[int, int], None]  # steps done, steps in all; raises to cancel


def denoise(
    dit: DiT,
    noise: Tensor,
    tables: ScheduleTables,
    condition: Condition,
    guidance_scale: float,
    *,
    reference_latent: Tensor | None = None,
    callback: StepCallback | None = None,
) -> Tensor:
    """The latent [1, C, H, W] in fp32 that the noise [1, C, H, W] becomes (still times the scaling factor).

    reference_latent [1, C, H, W'] is what an edit lays beside the noise, see `model_input`. The callback runs
    after every step; whatever it raises (Cancelled) ends the loop. Raises ParameterError for shapes that do
    not fit.
    """
    schedule = tables.schedule
    whole, latent = model_input(noise.to(dit.device, dit.wide), reference_latent, dit.config.in_channels)
    guidance = torch.tensor(guidance_scale, dtype=dit.wide, device=dit.device)
    delta_sigmas = schedule.delta_sigmas
    _, channels, _, width = latent.shape
    for step in range(schedule.steps):
        with trace.span("dit.step", step):
            prediction = dit.predict(whole, tables.step(step), condition)[:, :channels, :, :width]
            ops.guided_euler_step(latent, prediction, guidance, delta_sigmas[step], out=latent)
        if callback is not None:
            callback(step + 1, schedule.steps)
    return latent.clone(memory_format=torch.contiguous_format)


def model_input(noise: Tensor, reference: Tensor | None, in_channels: int) -> tuple[Tensor, Tensor]:
    """What the DiT sees at every step, and the view of it that the steps move, which starts as the noise.

    noise [1, C, H, W]. A DiT of 2 C input channels takes a reference [1, C, H, W] as further channels, one of
    C takes [1, C, H, W'] as further columns. Raises ParameterError for shapes that do not fit.
    """
    channels, width = noise.shape[1], noise.shape[3]
    if reference is None:
        if in_channels != channels:
            raise ParameterError(
                f"this DiT has {in_channels} input channels and the noise {channels}: "
                "it needs a reference picture, or noise of as many channels"
            )
        whole = noise.clone()
    else:
        reference = reference.to(noise)
        axis = 3 if in_channels == channels else 1
        fitting = (1, channels, noise.shape[2], reference.shape[3] if axis == 3 else width)
        if tuple(reference.shape) != fitting or in_channels not in (channels, 2 * channels):
            raise ParameterError(
                f"a DiT of {in_channels} input channels cannot see a reference latent "
                f"{list(reference.shape)} beside a latent {list(noise.shape)}"
            )
        whole = torch.cat([noise, reference], dim=axis)
    return whole, whole[:, :channels, :, :width]
