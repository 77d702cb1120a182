"""Recorded steps: replays alone draw the image that eager steps draw, in any order among other images."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from blip3o_rt.config import SchedulerConfig
from blip3o_rt.dit.captured import CapturedImage, Geometry
from blip3o_rt.dit.conditioning import ConditionTokens, condition_tokens
from blip3o_rt.dit.denoise import denoise
from blip3o_rt.dit.model import DiT
from blip3o_rt.dit.scheduler import flow_schedule
from blip3o_rt.dit.step import StepState, guided_step
from blip3o_rt.errors import DeviceError
from blip3o_rt.graphs import GraphRunner
from tests.dit.oracle import oracle, runtime, small_config
from tests.recorded_graph import RecordedGraphs

TOKENS, SIDE = 7, 5


@dataclass(frozen=True)
class Picture:
    """The inputs of one image's diffusion stage."""

    noise: Tensor
    hidden: Tensor
    beside: Tensor | None
    seen: Tensor | None
    steps: int
    guidance: float


class Model:
    """A small transformer with stand-ins for its connectors."""

    def __init__(self, dtype: torch.dtype = torch.float32, in_channels: int = 4) -> None:
        config = small_config(in_channels=in_channels)
        self.dit: DiT = runtime(config, oracle(config), dtype)
        generator = torch.Generator().manual_seed(3)
        self.connector = torch.randn(4, config.caption_channels, generator=generator)
        self.graphs = RecordedGraphs()

    def tokens(self, hidden: Tensor, seen: Tensor | None) -> ConditionTokens:
        connector = lambda x: (x.float() @ self.connector).to(self.dit.dtype)  # noqa: E731
        return condition_tokens(hidden, connector, seen, connector)

    def recorded(self, picture: Picture) -> CapturedImage:
        geometry = Geometry.of(picture.noise, picture.hidden, picture.beside, picture.seen)
        return CapturedImage(self.dit, geometry, self.tokens, picture.hidden.dtype, GraphRunner(self.graphs))

    def eager(self, picture: Picture) -> Tensor:
        return denoise(
            self.dit,
            picture.noise,
            self.dit.schedule_tables(flow_schedule(SchedulerConfig(shift=3.0), picture.steps)),
            self.dit.condition(self.tokens(picture.hidden, picture.seen)),
            picture.guidance,
            reference_latent=picture.beside,
        )

    def replayed(self, recorded: CapturedImage, picture: Picture) -> Tensor:
        return denoise(
            self.dit,
            picture.noise,
            self.dit.schedule_tables(flow_schedule(SchedulerConfig(shift=3.0), picture.steps)),
            recorded.condition(picture.hidden, picture.seen),
            picture.guidance,
            reference_latent=picture.beside,
            captured=recorded,
        )


def picture(seed: int, *, steps: int = 3, beside: bool = False, seen: int = 0) -> Picture:
    generator = torch.Generator().manual_seed(seed)

    def latents(count: int) -> Tensor:
        return torch.randn(count, 4, SIDE, SIDE, generator=generator)

    return Picture(
        latents(1),
        torch.randn(TOKENS, 4, generator=generator),
        latents(1) if beside else None,
        latents(seen) if seen else None,
        steps,
        1.5 + seed,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("in_channels", "beside", "seen"),
    [(4, False, 0), (4, True, 0), (4, False, 1), (4, True, 2), (8, True, 1)],
    ids=["text", "columns", "condition", "columns and condition", "channels and condition"],
)
def test_replays_draw_what_eager_steps_draw(
    dtype: torch.dtype, in_channels: int, beside: bool, seen: int
) -> None:
    """Bit for bit, for images of other contents, numbers of steps and guidance than were recorded."""
    model = Model(dtype, in_channels)
    recorded = model.recorded(picture(0, beside=beside, seen=seen))
    assert model.graphs.captured == 2  # the condition, and one step for all schedules
    for seed, steps in ((1, 4), (2, 1), (3, 7)):
        asked = picture(seed, steps=steps, beside=beside, seen=seen)
        before = model.graphs.replayed
        assert torch.equal(model.replayed(recorded, asked), model.eager(asked))
        assert model.graphs.replayed == before + 1 + steps


def test_pictures_at_different_steps_take_turns() -> None:
    """Each of three images, of other schedules and geometries, gets the bits it gets alone."""
    model = Model()
    asked = [picture(1, steps=5), picture(2, steps=3), picture(3, steps=4, beside=True)]
    seats = [model.recorded(one) for one in asked]
    running = []
    for seat, one in zip(seats, asked, strict=True):
        tables = model.dit.schedule_tables(flow_schedule(SchedulerConfig(shift=3.0), one.steps))
        seat.condition(one.hidden, one.seen)
        running.append((seat.begin(one.noise, tables, one.guidance, one.beside), one.steps))
    for turn in (0, 0, 1, 2, 0, 2, 1, 2, 2, 0, 1, 0):
        running[turn][0]()
    for (steps, count), one in zip(running, asked, strict=True):
        assert steps.state.index.item() == count
        assert torch.equal(steps.state.latent, model.eager(one))


def test_a_step_that_reads_back_cannot_be_recorded() -> None:
    model = Model()

    def reads_its_number(dit: DiT, state: StepState) -> None:
        dit.predict(state.whole, state.tables.step(int(state.index)), state.condition)

    asked = picture(0)
    geometry = Geometry.of(asked.noise, asked.hidden, None, None)
    with pytest.raises(DeviceError, match=r"dit reads_its_number of a latent of 5 x 5, 7 hidden states"):
        CapturedImage(
            model.dit, geometry, model.tokens, torch.float32, GraphRunner(model.graphs), [reads_its_number]
        )


def test_a_step_recorded_with_its_number_is_seen() -> None:
    """What these tests catch: a step whose modulation is that of the recording draws another image."""
    model = Model()

    def first_step(dit: DiT, state: StepState) -> None:
        at = state.index.clone()
        state.index.zero_()
        guided_step(dit, state)
        state.index.copy_(at + 1)

    asked = picture(1, steps=3)
    geometry = Geometry.of(asked.noise, asked.hidden, None, None)
    recorded = CapturedImage(
        model.dit, geometry, model.tokens, torch.float32, GraphRunner(model.graphs), [first_step]
    )
    recorded.condition(asked.hidden)
    tables = model.dit.schedule_tables(flow_schedule(SchedulerConfig(shift=3.0), asked.steps))
    steps = recorded.begin(asked.noise, tables, asked.guidance)
    for _ in range(asked.steps):
        steps(first_step)
    assert not torch.equal(steps.state.latent, model.eager(asked))
