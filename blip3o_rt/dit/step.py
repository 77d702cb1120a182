"""A step of the denoising loop over tensors that stay where they are, so that it can be captured once.

A step is of one image or of several, each at its own step of its own schedule, with its own condition and
guidance. An image's bits are those of its step alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from blip3o_rt import ops
from blip3o_rt.dit.conditioning import Condition
from blip3o_rt.dit.model import DiT, ScheduleTables, StepInput
from blip3o_rt.dit.solvers import EULER, Solver
from blip3o_rt.errors import ParameterError


@dataclass(frozen=True)
class History:
    """What steps of the fast tier leave to later ones of the same image.

    predictions [2, C, h, w], of the last two times that the DiT ran, the newer first, and the noise levels
    [2] that they were made at; denoised [1, C, h, w], the last estimate of x0, where the solver keeps it.
    Where `first` [] is true, what is kept belongs to another image and is ignored.
    """

    predictions: Tensor
    sigmas: Tensor
    denoised: Tensor

    @classmethod
    def of(cls, latent: Tensor) -> History:
        """Room for that of a latent [1, C, h, w]."""
        zeros = torch.zeros_like(latent, memory_format=torch.contiguous_format)
        return cls(zeros.repeat(2, 1, 1, 1), zeros.new_zeros(2), zeros)

    def keep(self, prediction: Tensor, sigma: Tensor, first: Tensor) -> None:
        """Keep a prediction [1, C, h, w] made at a noise level []."""
        self.predictions[1] = torch.where(first, prediction[0], self.predictions[0])
        self.predictions[0] = prediction[0]
        self.sigmas[1] = torch.where(first, torch.inf, self.sigmas[0])  # infinitely far off: of no slope
        self.sigmas[0] = sigma

    def extrapolated(self, sigma: Tensor) -> Tensor:
        """The prediction [1, C, h, w] at a noise level, in a straight line from the last two."""
        (newer, older), (at_newer, at_older) = self.predictions, self.sigmas
        return torch.lerp(newer, older, (sigma - at_newer) / (at_older - at_newer))[None]


@dataclass(frozen=True, eq=False)
class StepState:
    """What the steps of one image read and write.

    model_input [1, in_channels, H, W] is what the DiT sees, latent [1, C, h, w] the view of it that the steps
    move; index int64 [1] is the number of steps done; guidance_scale [].
    """

    model_input: Tensor
    latent: Tensor
    index: Tensor
    guidance_scale: Tensor
    tables: ScheduleTables
    condition: Condition
    history: History

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
        noise = noise.to(dit.device, dit.compute_dtype)
        seen, latent = with_reference(noise, reference_latent, dit.config.in_channels)
        index = torch.zeros(1, dtype=torch.int64, device=dit.device)
        guidance = torch.tensor(guidance_scale, dtype=dit.compute_dtype, device=dit.device)
        return cls(seen, latent, index, guidance, tables, condition, History.of(latent))

    def prediction(self, predicted: Tensor) -> Tensor:
        """The part of the DiT's predictions [branches, out_channels, H, W] that is of the latent."""
        _, channels, _, width = self.latent.shape
        return predicted[:, :channels, :, :width]


class StepKind(Protocol):
    """The next step of images, all of it on the device."""

    @property
    def name(self) -> str: ...

    @property
    def solver(self) -> Solver: ...

    def __call__(self, dit: DiT, states: Sequence[StepState]) -> None:
        """Make the step that each state.index says, which it increments."""


Steps = Callable[[StepKind, Sequence[StepState]], None]  # runs or replays one


@dataclass(frozen=True)
class EagerSteps:
    """Steps that are not captured."""

    dit: DiT

    def __call__(self, kind: StepKind, states: Sequence[StepState]) -> None:
        """Make the next step of each image."""
        kind(self.dit, states)


class GuidedStep:
    """Both branches, then guidance and Euler's move in one operation: every step of the exact tier."""

    name = "guided_step"
    solver: Solver = EULER

    def __call__(self, dit: DiT, states: Sequence[StepState]) -> None:
        """Make the step that each state.index says, which it increments."""
        inputs = [StepInput(s.model_input, s.tables.at(s.index), s.condition) for s in states]
        for state, predicted in zip(states, dit.predict_each(inputs), strict=True):
            ops.guided_euler_step(
                state.latent,
                state.prediction(predicted),
                state.guidance_scale,
                state.tables.schedule.delta_sigmas.index_select(0, state.index)[0],
                out=state.latent,
            )
            state.index.add_(1)


guided_step = GuidedStep()


def with_reference(noise: Tensor, reference: Tensor | None, in_channels: int) -> tuple[Tensor, Tensor]:
    """What the DiT sees at every step, and the view of it that the steps move, which starts as the noise.

    noise [1, C, H, W]. A DiT of 2 C input channels takes a reference [1, C, H, W] as further channels, one of
    C takes [1, C, H, W'] as further columns. Raises ParameterError for shapes that do not fit.
    """
    channels, width = noise.shape[1], noise.shape[3]
    if reference is None:
        if in_channels != channels:
            raise ParameterError(
                f"this DiT has {in_channels} input channels and the noise {channels}: "
                "it needs a reference image, or noise of as many channels"
            )
        seen = noise.clone()
    else:
        reference = reference.to(noise)
        axis = 3 if in_channels == channels else 1
        fitting = (1, channels, noise.shape[2], reference.shape[3] if axis == 3 else width)
        if tuple(reference.shape) != fitting or in_channels not in (channels, 2 * channels):
            raise ParameterError(
                f"a DiT of {in_channels} input channels cannot see a reference latent "
                f"{list(reference.shape)} beside a latent {list(noise.shape)}"
            )
        seen = torch.cat([noise, reference], dim=axis)
    return seen, seen[:, :channels, :, :width]
