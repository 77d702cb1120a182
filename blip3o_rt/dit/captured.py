"""The diffusion stage of images of one geometry, captured over buffers that stay where they are.

An image's condition is one graph and each kind of step another; a step finds its number on the device,
so one graph serves every step of every schedule, and images that are at different steps can take turns or
share one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from blip3o_rt.config import DiTConfig
from blip3o_rt.dit.conditioning import Condition, ConditionTokens
from blip3o_rt.dit.model import DiT, ScheduleTables, area_widths
from blip3o_rt.dit.schedule import Schedule
from blip3o_rt.dit.step import StepKind, StepState, guided_step, with_reference
from blip3o_rt.graphs import GraphRunner
from blip3o_rt.params import MAX_STEPS

SMALL_STEP_ROWS = 256  # more gain nothing; float32 products, each of one image, gain by a cached weight

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

    def held_bytes(self, config: DiTConfig, dtype: torch.dtype) -> int:
        """What an image of a captured geometry keeps.

        Keys and values of the cross-attention, and in float32 the modulation of the longest schedule.
        """
        latents = self.condition_latents or (0,)
        tokens = self.hidden_states[0] + math.prod((*latents[:1], *latents[2:]))
        keys_and_values = 2 * config.num_layers * config.cross_width * tokens * dtype.itemsize
        return keys_and_values + MAX_STEPS * 7 * config.width * torch.float32.itemsize  # six of the blocks

    def step_rows(self, config: DiTConfig) -> int:
        """The latent tokens of both branches of an image in a step."""
        _, channels, height, width = self.noise
        if self.concat_latent is not None and config.in_channels == channels:
            width += self.concat_latent[3]
        return 2 * (height * width // config.patch_size**2)

    def step_bytes(self, config: DiTConfig, dtype: torch.dtype) -> int:
        """The activations of both branches of an image in a step."""
        widths = sum(area_widths(config).values()) + config.width
        return self.step_rows(config) * widths * dtype.itemsize

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
    """Buffers of one image of a geometry, and its condition captured over them; see `CapturedImages`."""

    def __init__(
        self, dit: DiT, geometry: Geometry, tokens: Tokens, hidden_dtype: torch.dtype, runner: GraphRunner
    ) -> None:
        def zeros(shape: Shape) -> Tensor:
            return torch.zeros(shape, dtype=dit.compute_dtype, device=dit.device)

        concat = None if geometry.concat_latent is None else zeros(geometry.concat_latent)
        self._hidden_states = zeros(geometry.hidden_states).to(hidden_dtype)
        latents = geometry.condition_latents
        self._condition_latents = None if latents is None else zeros(latents)
        condition = dit.condition(tokens(self._hidden_states, self._condition_latents))
        self.state = StepState.begin(dit, zeros(geometry.noise), _longest(dit), condition, 1.0, concat)
        self.compute_condition: Callable[[], Condition] = runner.capture(
            f"dit.condition of {geometry}",
            lambda: dit.condition(tokens(self._hidden_states, self._condition_latents), out=condition),
        )
        self.busy = False

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within the block the buffers are one image's: `busy` says so."""
        self.busy = True
        try:
            yield
        finally:
            self.busy = False

    def condition(self, hidden_states: Tensor, condition_latents: Tensor | None = None) -> Condition:
        """The condition of an image's hidden states and reference latents, in the buffers of its steps."""
        self._hidden_states.copy_(hidden_states)
        if self._condition_latents is not None and condition_latents is not None:
            self._condition_latents.copy_(condition_latents)
        self.compute_condition()
        return self.state.condition

    def begin(
        self, noise: Tensor, tables: ScheduleTables, guidance_scale: float, concat: Tensor | None = None
    ) -> None:
        """The state before the first step of the image whose condition was computed last."""
        state, steps = self.state, tables.schedule.steps
        seen, _ = with_reference(noise.to(state.model_input), concat, state.model_input.shape[1])
        state.model_input.copy_(seen)
        state.index.zero_()
        state.guidance_scale.fill_(guidance_scale)
        state.tables.blocks[:steps].copy_(tables.blocks)
        state.tables.final[:steps].copy_(tables.final)
        state.tables.schedule.sigmas[: steps + 1].copy_(tables.schedule.sigmas)


class CapturedImages:
    """Buffers of some images of one geometry, and their conditions and steps captured over them.

    Steps are captured for runs of 1, 2, 4, ... images, each of which begins at a multiple of its length. The
    step of any images is that of a few runs, and no run has an image that does not take part.

    Args:
        tokens: Turns hidden states (`hidden_dtype`) and reference latents into cross-attention tokens.
        kinds: The steps to capture.
        count: Images, a power of two.
    """

    def __init__(
        self,
        dit: DiT,
        geometry: Geometry,
        tokens: Tokens,
        hidden_dtype: torch.dtype,
        runner: GraphRunner,
        kinds: Sequence[StepKind] = (guided_step,),
        count: int = 1,
    ) -> None:
        self.images = [CapturedImage(dit, geometry, tokens, hidden_dtype, runner) for _ in range(count)]
        states = [image.state for image in self.images]
        self._indices = {state: index for index, state in enumerate(states)}
        lengths = [count >> shift for shift in range(count.bit_length())]  # what needs most memory is first
        self._runs = [range(first, first + length) for length in lengths for first in range(0, count, length)]
        self._works = {
            (kind, run): runner.capture(
                f"dit {kind.name} x{len(run)} of {geometry}",
                partial(kind, dit, states[run.start : run.stop]),
            )
            for run in self._runs
            for kind in kinds
        }

    def __call__(self, kind: StepKind, states: Sequence[StepState]) -> None:
        """Replay the next step of each image."""
        left = {self._indices[state] for state in states}
        for run in self._runs:
            if left.issuperset(run):
                self._works[kind, run]()
                left.difference_update(run)

    @property
    def free(self) -> CapturedImage | None:
        """The first whose buffers are no image's."""
        return next((image for image in self.images if not image.busy), None)

    def run_once(self) -> None:
        """All that would be captured, which compiles its kernels where nothing is."""
        for image in self.images:
            image.compute_condition()
        for work in self._works.values():
            work()


def images_of_a_small_step(config: DiTConfig, geometries: Sequence[Geometry]) -> int:
    """How many images share a step on the CPU: as many as have SMALL_STEP_ROWS together, or one."""
    return max(1, SMALL_STEP_ROWS // max(geometry.step_rows(config) for geometry in geometries))


def images_of_a_step(dit: DiT, geometries: Sequence[Geometry], free: int) -> int:
    """How many images share a step: 1, 2, 4 or 8, as half of `free` bytes of memory has room for.

    One where each image would have products of its own.
    """
    if not dit.batch_invariant:
        return 1
    held = sum(geometry.held_bytes(dit.config, dit.dtype) for geometry in geometries)
    step = max(geometry.step_bytes(dit.config, dit.dtype) for geometry in geometries)
    return next((count for count in (8, 4, 2) if count * (held + step) <= free // 2), 1)


def _longest(dit: DiT) -> ScheduleTables:
    """Tables with room for any schedule."""
    return dit.schedule_tables(Schedule(torch.zeros(MAX_STEPS + 1), torch.zeros(MAX_STEPS)))
