"""A step of the denoising loop over tensors that stay where they are, so that it can be recorded once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from blip3o_rt import ops
from blip3o_rt.dit.conditioning import Condition
from blip3o_rt.dit.model import DiT, ScheduleTables
from blip3o_rt.errors import ParameterError


@dataclass(frozen=True)
class StepState:
    """What the steps of one picture read and write.

    whole [1, in_channels, H, W] is what the DiT sees, latent [1, C, h, w] the view of it that the steps move;
    index int64 [1] is the number of steps done; guidance_scale [].
    """

    whole: Tensor
    latent: Tensor
    index: Tensor
    guidance_scale: Tensor
    tables: ScheduleTables
    condition: Condition

    @classmethod
    def begin(
        cls,
        dit: DiT,
        noise: Tensor,
        tables: ScheduleTables,
        condition: Condition,
        guidance_scale: float,
        reference_latent: Tensor | None = None,
    ) -> StepState:
        """The state before the first step. Raises ParameterError for shapes that do not fit."""
        whole, latent = model_input(noise.to(dit.device, dit.wide), reference_latent, dit.config.in_channels)
        index = torch.zeros(1, dtype=torch.int64, device=dit.device)
        guidance = torch.tensor(guidance_scale, dtype=dit.wide, device=dit.device)
        return cls(whole, latent, index, guidance, tables, condition)


StepKind = Callable[[DiT, StepState], None]  # a way to make the next step, all of it on the device


def guided_step(dit: DiT, state: StepState) -> None:
    """Both halves, guidance, and the Euler step that state.index says, which it increments."""
    _, channels, _, width = state.latent.shape
    prediction = dit.predict(state.whole, state.tables.at(state.index), state.condition)
    ops.guided_euler_step(
        state.latent,
        prediction[:, :channels, :, :width],
        state.guidance_scale,
        state.tables.schedule.delta_sigmas.index_select(0, state.index)[0],
        out=state.latent,
    )
    state.index.add_(1)


@dataclass(frozen=True)
class Steps:
    """The steps of one picture, called one after the other: recorded kinds are replayed, others run."""

    dit: DiT
    state: StepState
    recorded: Mapping[StepKind, Callable[[], None]] = field(default_factory=dict)

    def __call__(self, kind: StepKind = guided_step) -> None:
        """Make the next step."""
        if kind in self.recorded:
            self.recorded[kind]()
        else:
            kind(self.dit, self.state)


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
