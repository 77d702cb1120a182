"""Stages with one of their optimisations taken out, so that its worth can be measured.

The mathematics stays the same, and nothing of this is an option of the runtime: each piece is taken out from
outside, by giving a stage other inputs or other pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from blip3o_rt import ops
from blip3o_rt.dit import model as dit_model
from blip3o_rt.dit.conditioning import ConditionTokens
from blip3o_rt.dit.model import DiT
from blip3o_rt.dit.scheduler import Schedule
from blip3o_rt.dit.step import StepKind, StepState, guided_step
from blip3o_rt.dit.workspace import Area, Workspace
from blip3o_rt.measure.bench.stages import DitStage
from blip3o_rt.vae.blocks import Convolution, NearestUpsampling, Weights, channels_first, channels_last

# Diffusion transformer


def null_written_out(tokens: ConditionTokens) -> ConditionTokens:
    """The same condition, each of the null half's tokens as if no other were identical to it."""
    counts = torch.tensor(tokens.null_counts, device=tokens.null.device)
    every = tokens.null.repeat_interleave(counts, dim=0, output_size=sum(tokens.null_counts))
    return replace(tokens, null=every, null_counts=(1,) * len(every))


def condition_every_step(stage: DitStage) -> StepKind:
    """A step that computes the condition's keys and values first."""

    def step(dit: DiT, state: StepState) -> None:
        dit.condition(stage.tokens, out=state.condition)
        guided_step(dit, state)

    return step


def tables_every_step(_: DitStage) -> StepKind:
    """The first step of a schedule at every call, which computes its time embedding and modulation first."""

    def step(dit: DiT, state: StepState) -> None:
        whole = state.tables.schedule
        first = Schedule(whole.sigmas[:2], whole.timesteps[:1])
        guided_step(dit, replace(state, tables=dit.tables(first), index=torch.zeros_like(state.index)))

    return step


class OnBothHalves:
    """The first block, given both halves though they are still the same before its cross-attention."""

    def __init__(self, block: Any) -> None:
        self._block = block

    def __call__(self, x: Tensor, *arguments: Any) -> Tensor:
        return self._block(x.repeat(2, 1, 1), *arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block, name)


class OwnMemory(Workspace):
    """Memory that is allocated each time it is taken."""

    def take(self, area: Area, *shape: int) -> Tensor:
        return self._memory[area].new_empty(shape)


def with_own_memory(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A step whose activations are each allocated."""

    def call() -> Tensor:
        with pieces([(dit_model, "Workspace")], OwnMemory):
            return step()

    return call


# Autoencoder


class DoubledThenConvolved(NearestUpsampling):
    """The upsampling of the published decoder in its two steps: nearest neighbours, then conv3x3."""

    def __init__(self, weights: Weights, name: str, shortcut: bool) -> None:
        self.convolution, self.shortcut = Convolution(weights, name), shortcut

    def __call__(self, x: Tensor) -> Tensor:
        doubled = F.interpolate(channels_first(x), scale_factor=2.0, mode="nearest")
        result = self.convolution(channels_last(doubled))
        return ops.add_pixel_shuffle(result, x) if self.shortcut else result


class ConvolvedChannelsFirst(Convolution):
    """A convolution that holds its weight and takes pictures channels first, as torch does by default."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.weight = self.weight.contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        padding = self.weight.shape[-1] // 2
        x = channels_first(x).contiguous()
        return channels_last(F.conv2d(x, self.weight, self.bias, self.stride, padding, groups=self.groups))


@contextmanager
def pieces(places: list[tuple[ModuleType, str]], piece: Callable[..., Any]) -> Iterator[None]:
    """Within the block those names of modules stand for another piece."""
    before = [getattr(module, name) for module, name in places]
    try:
        for module, name in places:
            setattr(module, name, piece)
        yield
    finally:
        for (module, name), original in zip(places, before, strict=True):
            setattr(module, name, original)
