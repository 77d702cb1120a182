"""Captured steps: replays alone draw the image that eager steps draw, among others and together with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from blip3o_rt import ops
from blip3o_rt.config import SchedulerConfig
from blip3o_rt.dit.captured import (
    CapturedImage,
    CapturedImages,
    Geometry,
    images_of_a_small_step,
    images_of_a_step,
)
from blip3o_rt.dit.conditioning import ConditionTokens, condition_tokens
from blip3o_rt.dit.denoise import Denoising, step_together
from blip3o_rt.dit.model import DiT
from blip3o_rt.dit.schedule import flow_schedule
from blip3o_rt.dit.step import GuidedStep, StepState
from blip3o_rt.errors import DeviceError
from blip3o_rt.graphs import GraphRunner
from blip3o_rt.ops.registry import Implementation
from tests.captured_graph import CapturedGraphs
from tests.dit.loop import denoise
from tests.dit.oracle import oracle, runtime, small_config

TOKENS, SIDE = 7, 5


@dataclass(frozen=True)
class Inputs:
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
        self.graphs = CapturedGraphs()

    def tokens(self, hidden: Tensor, seen: Tensor | None) -> ConditionTokens:
        connector = lambda x: (x.float() @ self.connector).to(self.dit.dtype)  # noqa: E731
        return condition_tokens(hidden, connector, seen, connector)

    def recorded(self, inputs: Inputs, count: int = 1) -> CapturedImages:
        geometry = Geometry.of(inputs.noise, inputs.hidden, inputs.beside, inputs.seen)
        runner = GraphRunner(self.graphs)
        return CapturedImages(self.dit, geometry, self.tokens, inputs.hidden.dtype, runner, count=count)

    def eager(self, inputs: Inputs) -> Tensor:
        return denoise(
            self.dit,
            inputs.noise,
            self.dit.schedule_tables(flow_schedule(SchedulerConfig(shift=3.0), inputs.steps)),
            self.dit.condition(self.tokens(inputs.hidden, inputs.seen)),
            inputs.guidance,
            reference_latent=inputs.beside,
        )

    def replayed(self, recorded: CapturedImages, inputs: Inputs) -> Tensor:
        return denoise(
            self.dit,
            inputs.noise,
            self.dit.schedule_tables(flow_schedule(SchedulerConfig(shift=3.0), inputs.steps)),
            recorded.images[0].condition(inputs.hidden, inputs.seen),
            inputs.guidance,
            reference_latent=inputs.beside,
            captured=recorded,
        )


def inputs(seed: int, *, steps: int = 3, beside: bool = False, seen: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def latents(count: int) -> Tensor:
        return torch.randn(count, 4, SIDE, SIDE, generator=generator)

    return Inputs(
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
    recorded = model.recorded(inputs(0, beside=beside, seen=seen))
    assert model.graphs.captured == 2  # the condition, and one step for all schedules
    for seed, steps in ((1, 4), (2, 1), (3, 7)):
        asked = inputs(seed, steps=steps, beside=beside, seen=seen)
        before = model.graphs.replayed
        assert torch.equal(model.replayed(recorded, asked), model.eager(asked))
        assert model.graphs.replayed == before + 1 + steps


def begun(model: Model, captured: CapturedImages, inputs: Inputs) -> tuple[CapturedImage, Denoising]:
    tables = model.dit.schedule_tables(flow_schedule(SchedulerConfig(shift=3.0), inputs.steps))
    image = captured.free
    assert image is not None
    image.busy = True
    image.condition(inputs.hidden, inputs.seen)
    image.begin(inputs.noise, tables, inputs.guidance, inputs.beside)
    return image, Denoising(captured, image.state, tables)


def test_images_at_different_steps_take_turns() -> None:
    """Each of three images, of other schedules and geometries, gets the bits it gets alone."""
    model = Model()
    asked = [inputs(1, steps=5), inputs(2, steps=3), inputs(3, steps=4, beside=True)]
    running = [begun(model, model.recorded(one), one)[1] for one in asked]
    for turn in (0, 0, 1, 2, 0, 2, 1, 2, 2, 0, 1, 0):
        running[turn].step()
    for denoising, one in zip(running, asked, strict=True):
        assert denoising.done == denoising.total == one.steps
        assert torch.equal(denoising.latent, model.eager(one))


def test_images_share_captured_steps_and_leave_as_they_finish() -> None:
    """Six images in four places: each has the bits it has alone, and full places are one replay."""
    model = Model()
    captured = model.recorded(inputs(0), count=4)
    assert model.graphs.captured == 4 + 4 + 2 + 1  # conditions, and steps of 1, 2 and 4 images
    waiting = [inputs(seed, steps=2 + seed % 3) for seed in range(1, 7)]
    running: dict[Denoising, tuple[CapturedImage, Inputs]] = {}
    replays = []
    while waiting or running:
        while waiting and captured.free:
            image, denoising = begun(model, captured, waiting[0])
            running[denoising] = image, waiting.pop(0)
        before = model.graphs.replayed
        step_together(list(running))
        replays.append((len(running), model.graphs.replayed - before))
        for denoising, (image, one) in list(running.items()):
            if denoising.done == denoising.total:
                assert torch.equal(denoising.latent, model.eager(one))
                image.busy = False
                del running[denoising]
    assert captured.free is captured.images[0]
    assert {made for count, made in replays if count == 4} == {1}
    assert all(made <= count for count, made in replays)


@pytest.mark.parametrize(
    ("in_channels", "beside", "seen"), [(4, False, 0), (4, True, 1), (8, True, 0)], ids=str
)
def test_memory_decides_how_many_images_share_a_step(in_channels: int, beside: bool, seen: int) -> None:
    """Counted as what the buffers of an image and a step's workspace hold."""
    model = Model(torch.bfloat16, in_channels)
    asked = inputs(1, beside=beside, seen=seen)
    geometry = Geometry.of(asked.noise, asked.hidden, asked.beside, asked.seen)
    (image,) = model.recorded(asked).images
    condition, tables = image.state.condition, image.state.tables
    held = [condition.keys, condition.values, tables.blocks, tables.final]
    assert geometry.held_bytes(model.dit.config, model.dit.dtype) == sum(tensor.nbytes for tensor in held)
    tokens = image.state.model_input[0, 0].numel()
    memory = model.dit._workspace(2 * tokens)._memory.values()
    x = 2 * tokens * model.dit.config.width * 2
    step = geometry.step_bytes(model.dit.config, model.dit.dtype)
    assert step == sum(area.nbytes for area in memory) + x

    each = geometry.held_bytes(model.dit.config, model.dit.dtype) + step
    for batch_invariant, expected in ((True, [1, 1, 2, 2, 4, 8, 8]), (False, [1] * 7)):
        product = Implementation("stand-in", lambda call: call.out, batch_invariant=batch_invariant)
        with ops.all_ops()["linear"].forcing(product):
            found = [images_of_a_step(model.dit, [geometry], 2 * each * n) for n in (0, 1, 2, 3, 4, 8, 99)]
        assert found == expected


@pytest.mark.parametrize(("side", "count"), [(4, 8), (8, 2), (11, 1), (32, 1)])
def test_small_images_share_a_step_on_the_cpu(side: int, count: int) -> None:
    model = Model(torch.bfloat16)
    geometry = Geometry((1, 4, side, side), (7, 16))
    assert geometry.step_rows(model.dit.config) == 2 * side * side
    assert images_of_a_small_step(model.dit.config, [geometry]) == count


def test_a_step_that_reads_back_cannot_be_recorded() -> None:
    model = Model()

    class ReadsItsNumber(GuidedStep):
        def __call__(self, dit: DiT, states: Sequence[StepState]) -> None:
            (state,) = states
            dit.predict(state.model_input, state.tables.step(int(state.index)), state.condition)

    asked = inputs(0)
    geometry = Geometry.of(asked.noise, asked.hidden, None, None)
    with pytest.raises(DeviceError, match=r"dit guided_step x1 of a latent of 5 x 5, 7 hidden states"):
        CapturedImages(
            model.dit, geometry, model.tokens, torch.float32, GraphRunner(model.graphs), [ReadsItsNumber()]
        )


def test_a_step_recorded_with_its_number_is_seen() -> None:
    """What these tests catch: a step whose modulation is that of the recording draws another image."""
    model = Model()

    class FirstStep(GuidedStep):
        def __call__(self, dit: DiT, states: Sequence[StepState]) -> None:
            (state,) = states
            at = state.index.clone()
            state.index.zero_()
            super().__call__(dit, states)
            state.index.copy_(at + 1)

    kind = FirstStep()
    asked = inputs(1, steps=3)
    geometry = Geometry.of(asked.noise, asked.hidden, None, None)
    recorded = CapturedImages(
        model.dit, geometry, model.tokens, torch.float32, GraphRunner(model.graphs), [kind]
    )
    (image,) = recorded.images
    image.condition(asked.hidden)
    tables = model.dit.schedule_tables(flow_schedule(SchedulerConfig(shift=3.0), asked.steps))
    image.begin(asked.noise, tables, asked.guidance)
    for _ in range(asked.steps):
        recorded(kind, [image.state])
    assert not torch.equal(image.state.latent, model.eager(asked))
