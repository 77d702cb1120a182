"""The solvers of the denoising loop, by name: how a step moves the latent, and which clean latent it aims at.

A latent at noise level s is (1 - s) x0 + s noise; a velocity is an estimate of noise - x0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from blip3o_rt.errors import ParameterError
from blip3o_rt.switches import DPM


class Levels(NamedTuple):
    """Noise levels [] of a step: before it (equal to `here` at the first step), at it and after it."""

    before: Tensor
    here: Tensor
    after: Tensor


class Solver(ABC):
    """A rule for steps. Latents, velocities and estimates are [1, C, h, w]; all work stays on the device.

    A solver sees one velocity a step: a method with two predictions a step is another kind of step, in
    shortcuts.py. `denoised` is memory between steps that the solver alone reads and writes, for an estimate
    of x0. At an image's first step it holds another image's.
    """

    @abstractmethod
    def move(self, latent: Tensor, velocity: Tensor, levels: Levels, denoised: Tensor) -> Tensor:
        """What a step along the velocity adds to the latent."""

    @abstractmethod
    def estimate(self, start: Tensor, end: Tensor, here: Tensor, after: Tensor, denoised: Tensor) -> Tensor:
        """The x0 that the step from latent `start` at level `here` to `end` at `after` was made on."""


class Euler(Solver):
    """A straight line to the estimate of x0."""

    def move(self, latent: Tensor, velocity: Tensor, levels: Levels, denoised: Tensor) -> Tensor:
        return (levels.after - levels.here) * velocity

    def estimate(self, start: Tensor, end: Tensor, here: Tensor, after: Tensor, denoised: Tensor) -> Tensor:
        return start + (end - start) * (here / (here - after))


class DPMSolver(Solver):
    """DPM-Solver++ (2M) (arXiv 2211.01095): Euler's move, plus a weight times the last change of x0."""

    def move(self, latent: Tensor, velocity: Tensor, levels: Levels, denoised: Tensor) -> Tensor:
        before, here, _ = levels
        found = latent - here * velocity
        change = found - torch.where(before == here, found, denoised)
        denoised.copy_(found)
        return EULER.move(latent, velocity, levels, denoised).add_(self._weight(levels) * change)

    def estimate(self, start: Tensor, end: Tensor, here: Tensor, after: Tensor, denoised: Tensor) -> Tensor:
        return denoised.clone()  # the move leads past it

    @staticmethod
    def _weight(levels: Levels) -> Tensor:
        """The weight [] is (1 - after / here) (l(after) - l(here)) / (2 (l(here) - l(before))).

        l(s) = log((1 - s) / s). Zero, so the step is Euler's, where that ends without noise, is the first, or
        follows one that began with nothing but noise.
        """
        before, here, after = levels
        change = (after.logit() - here.logit()) / (before.logit() - here.logit())
        return torch.where((after > 0) & (before > here), (after / here - 1) * change / 2, 0.0)


EULER = Euler()
SOLVERS: Mapping[str, Solver] = MappingProxyType({"euler": EULER, DPM: DPMSolver()})


def solver_named(name: str) -> Solver:
    """The solver of a name. Raises ParameterError for one that the table does not have."""
    if name not in SOLVERS:
        raise ParameterError(f"solver {name!r} is not in the table of dit/solvers.py: {', '.join(SOLVERS)}")
    return SOLVERS[name]
