"""What the fast tier changes of the denoising loop: guidance left out, predictions left out, another solver.

Which step is which is known before the loop begins, from the schedule alone, so nothing is read back from the
device and an image does not depend on any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blip3o_rt.dit.model import DiT, StepInput
from blip3o_rt.dit.schedule import Schedule
from blip3o_rt.dit.solvers import EULER, Levels, Solver, solver_named
from blip3o_rt.dit.step import StepKind, StepState, guided_step
from blip3o_rt.switches import GUIDANCE_INTERVAL, SOLVER, STEP_CACHE, setting

GUIDED, CONDITIONAL, EXTRAPOLATED = "guided", "conditional", "extrapolated"


@dataclass(frozen=True)
class Shortcuts:
    """The switches of the denoising loop; as made without arguments, none.

    guidance_interval: the lowest and the highest noise level with guidance, both included; at others the
    conditional branch is computed alone (arXiv 2404.07724). step_cache: the DiT runs at every step_cache-th
    step, from the first on, and at the last; what it predicts in between is extrapolated in a straight line
    from the last two times that it ran. solver: whose steps they are.
    """

    guidance_interval: tuple[float, float] = (0.0, 1.0)
    step_cache: int = 1
    solver: Solver = EULER

    @classmethod
    def of(cls, switches: Mapping[str, str]) -> Shortcuts:
        """What the switches ask for."""
        return cls(
            setting(switches, GUIDANCE_INTERVAL) or cls.guidance_interval,
            setting(switches, STEP_CACHE) or cls.step_cache,
            solver_named(setting(switches, SOLVER) or "euler"),
        )

    def steps(self, schedule: Schedule) -> list[StepKind]:
        """How each step of a schedule (on the CPU) is made."""
        lowest, highest = self.guidance_interval
        kinds = []
        for step, sigma in enumerate(schedule.sigmas[:-1].tolist()):
            level = round(sigma, 6)  # as the interval's ends are written
            if step % self.step_cache and step + 1 < schedule.steps:
                kinds.append(self._kind(EXTRAPOLATED))
            else:
                kinds.append(self._kind(GUIDED if lowest <= level <= highest else CONDITIONAL))
        return kinds

    @property
    def kinds(self) -> tuple[StepKind, ...]:
        """Every kind of step that a schedule may need."""
        predictions = [GUIDED]
        if self.guidance_interval != (0.0, 1.0):
            predictions.append(CONDITIONAL)
        if self.step_cache > 1:
            predictions.append(EXTRAPOLATED)
        return tuple(self._kind(prediction) for prediction in predictions)

    def _kind(self, prediction: str) -> StepKind:
        kept = self.step_cache > 1
        if prediction == GUIDED and not kept and self.solver == guided_step.solver:
            return guided_step
        return ShortStep(prediction, kept, self.solver)


@dataclass(frozen=True)
class ShortStep:
    """A step of the fast tier.

    prediction: of both branches, of the conditional one alone, or extrapolated. kept: whether a prediction
    of the DiT is kept for those that are extrapolated. solver: as in `Shortcuts`.
    """

    prediction: str
    kept: bool
    solver: Solver

    @property
    def name(self) -> str:
        return f"{self.prediction}_step"

    def __call__(self, dit: DiT, states: Sequence[StepState]) -> None:
        """Make the step that each state.index says, which it increments."""
        predicted: Sequence[Tensor | None] = [None] * len(states)
        if self.prediction != EXTRAPOLATED:
            predicted = dit.predict_each([self._input(state) for state in states])
        for state, found in zip(states, predicted, strict=True):
            self._move(state, found)

    def _input(self, state: StepState) -> StepInput:
        condition = state.condition if self.prediction == GUIDED else state.condition.unguided
        return StepInput(state.model_input, state.tables.at(state.index), condition)

    def _move(self, state: StepState, predicted: Tensor | None) -> None:
        around = torch.cat([state.index - 1, state.index, state.index + 1]).clamp_(min=0)
        levels = Levels(*state.tables.schedule.sigmas.to(state.latent.dtype).index_select(0, around))
        velocity = self._velocity(state, predicted, levels.here)
        state.latent.add_(self.solver.move(state.latent, velocity, levels, state.history.denoised))
        state.index.add_(1)

    def _velocity(self, state: StepState, predicted: Tensor | None, sigma: Tensor) -> Tensor:
        """What the step goes along [1, C, h, w], guided where it is; extrapolated without a prediction."""
        if predicted is None:
            return state.history.extrapolated(sigma)
        prediction = state.prediction(predicted)
        null, conditional = prediction[:1], prediction[-1:]
        velocity = null + state.guidance_scale * (conditional - null)
        if self.kept:
            state.history.keep(velocity, sigma, state.index[0] == 0)
        return velocity
