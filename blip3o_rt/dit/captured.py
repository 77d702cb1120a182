"""The diffusion stage of images of one geometry, captured over buffers that stay where they are.

An image's condition is one graph and each kind of step another; a step finds its number on the device,
so one graph serves every step of every schedule, and images that are at different steps can take turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from blip3o_rt.dit.conditioning import Condition, ConditionTokens
from blip3o_rt.dit.model import DiT, ScheduleTables
from blip3o_rt.dit.scheduler import Schedule
from blip3o_rt.dit.step import StepKind, Steps, StepState, guided_step, model_input
from blip3o_rt.graphs import GraphRunner
from blip3o_rt.params import MAX_STEPS

Shape = tuple[int, ...]
Tokens = Callable[[Tensor, Tensor | None], ConditionTokens]  # of hidden states and reference latents


@dataclass(frozen=True)
class Geometry:
    """The shapes that decide what an image's diffusion stage runs.

    Attributes:
        noise: [1, C, h, w].
        hidden_states: [T, hidden].
        concat_latent: Reference latent [1, C, h, w'] concatenated with the noise.
        condition_latents: Reference latents [n, C, h, w] that are cross-attention tokens.
    """

    noise: Shape
    hidden_states: Shape
    concat_latent: Shape | None = None
    condition_latents: Shape | None = None

    @classmethod
    def of(
        cls,
        noise: Tensor,
        hidden_states: Tensor,
        concat_latent: Tensor | None,
        condition_latents: Tensor | None,
    ) -> Geometry:
        """The geometry of an image's inputs."""
        given = (
            None if tensor is None else tuple(tensor.shape) for tensor in (concat_latent, condition_latents)
        )
        return cls(tuple(noise.shape), tuple(hidden_states.shape), *given)

    def __str__(self) -> str:
        height, width = self.noise[2:]
        parts = [f"a latent of {height} x {width}", f"{self.hidden_states[0]} hidden states"]
        if self.concat_latent is not None:
            parts.append(f"a reference of {self.concat_latent[2]} x {self.concat_latent[3]} beside the noise")
        if self.condition_latents is not None:
            count, _, height, width = self.condition_latents
            parts.append(f"{count} references of {height} x {width} in the condition")
        return ", ".join(parts)


class CapturedImage:
    """Buffers of one image of a geometry, and its condition and steps captured over them.

    `tokens` makes the condition's tokens of its hidden states, of hidden_dtype, and the reference latents
    that cross-attention sees. `kinds` are the steps to capture. Everything is allocated here.
    """

    def __init__(
        self,
        dit: DiT,
        geometry: Geometry,
        tokens: Tokens,
        hidden_dtype: torch.dtype,
        runner: GraphRunner,
        kinds: Sequence[StepKind] = (guided_step,),
    ) -> None:
        def zeros(shape: Shape) -> Tensor:
            return torch.zeros(shape, dtype=dit.wide, device=dit.device)

        beside = None if geometry.concat_latent is None else zeros(geometry.concat_latent)
        self._hidden_states = zeros(geometry.hidden_states).to(hidden_dtype)
        self._seen = None if geometry.condition_latents is None else zeros(geometry.condition_latents)
        condition = dit.condition(tokens(self._hidden_states, self._seen))
        self._state = StepState.begin(dit, zeros(geometry.noise), _longest(dit), condition, 1.0, beside)
        self._condition: Callable[[], Condition] = runner.capture(
            f"dit.condition of {geometry}",
            lambda: dit.condition(tokens(self._hidden_states, self._seen), out=condition),
        )
        works = {
            kind: runner.capture(f"dit {kind.__name__} of {geometry}", partial(kind, dit, self._state))
            for kind in kinds
        }
        self._steps = Steps(dit, self._state, works)
        self.busy = False

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within the block the buffers are one image's: `busy` says so."""
        self.busy = True
        try:
            yield
        finally:
            self.busy = False

    def condition(self, hidden_states: Tensor, seen: Tensor | None = None) -> Condition:
        """The condition of an image's hidden states and reference latents, in the buffers of its steps."""
        self._hidden_states.copy_(hidden_states)
        if self._seen is not None and seen is not None:
            self._seen.copy_(seen)
        self._condition()
        return self._state.condition

    def begin(
        self, noise: Tensor, tables: ScheduleTables, guidance_scale: float, beside: Tensor | None = None
    ) -> Steps:
        """The steps of the image whose condition was computed last, from its noise on."""
        state, steps = self._state, tables.schedule.steps
        whole, _ = model_input(noise.to(state.whole), beside, state.whole.shape[1])
        state.whole.copy_(whole)
        state.index.zero_()
        state.guidance_scale.fill_(guidance_scale)
        state.tables.blocks[:steps].copy_(tables.blocks)
        state.tables.final[:steps].copy_(tables.final)
        state.tables.schedule.sigmas[: steps + 1].copy_(tables.schedule.sigmas)
        return self._steps

    def run_once(self) -> None:
        """The condition and a step of each kind, which compiles their kernels where nothing is captured."""
        self._condition()
        for work in self._steps.captured.values():
            work()


def _longest(dit: DiT) -> ScheduleTables:
    """Tables with room for any schedule."""
    return dit.schedule_tables(Schedule(torch.zeros(MAX_STEPS + 1), torch.zeros(MAX_STEPS)))
