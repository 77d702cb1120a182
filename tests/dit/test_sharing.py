"""Images that share a step: each one's latent has the bits of its step alone, whatever the others are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from blip3o_rt import ops
from blip3o_rt.config import SchedulerConfig
from blip3o_rt.dit.conditioning import ConditionTokens
from blip3o_rt.dit.denoise import step_together
from blip3o_rt.dit.layout import layout, quantized
from blip3o_rt.dit.model import DiT, StepInput
from blip3o_rt.dit.schedule import flow_schedule
from blip3o_rt.dit.shortcuts import CONDITIONAL, GUIDED, ShortStep
from blip3o_rt.dit.solvers import SOLVERS
from blip3o_rt.dit.step import StepKind, StepState, guided_step
from blip3o_rt.ops.registry import Implementation
from blip3o_rt.precision import BF16, FP32, MIXED, Precision
from tests.dit.oracle import oracle, small_config

PRECISIONS = [FP32, BF16, MIXED]
BATCHES = [1, 2, 4, 8]
PRODUCTS = 6  # of a block
CONFIG = small_config()


@cache
def weights(precision: Precision) -> dict[str, Tensor]:
    original = oracle(CONFIG).state_dict()
    return {
        spec.name: spec.build([original[source.name] for source in spec.sources], spec.model_dtype(precision))
        for spec in layout(CONFIG)
    }


@cache
def dit_of(precision: Precision) -> DiT:
    return DiT(CONFIG, weights(precision))


def state_of(dit: DiT, seed: int) -> StepState:
    """An image at a step in the middle; grid, prompt, schedule, guidance, and what it edits, by its seed."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    side, beside, edited = 4 + seed % 3, seed % 4 == 1, seed % 2 == 1
    counts = (5 + seed, 7) if edited else (5 + seed,)
    tokens = ConditionTokens(
        normal(sum(counts), CONFIG.caption_channels), normal(len(counts), CONFIG.caption_channels), counts
    )
    state = StepState.begin(
        dit,
        normal(1, 4, side, side + 1),
        dit.schedule_tables(flow_schedule(SchedulerConfig(shift=3.0), 3 + seed)),
        dit.condition(tokens),
        1.5 + seed,
        normal(1, 4, side, 3) if beside else None,
    )
    state.index.fill_(seed % 3)
    return state


def shared(dit: DiT, seeds: Sequence[int], kind: StepKind = guided_step) -> list[Tensor]:
    """The latents after one step of all images together."""
    states = [state_of(dit, seed) for seed in seeds]
    kind(dit, states)
    assert [int(state.index) for state in states] == [seed % 3 + 1 for seed in seeds]
    return [state.latent for state in states]


def assert_as_alone(dit: DiT, seeds: Sequence[int], kind: StepKind = guided_step) -> None:
    for seed, latent in zip(seeds, shared(dit, seeds, kind), strict=True):
        (alone,) = shared(dit, [seed], kind)
        assert torch.equal(latent, alone), seed
        assert not torch.equal(latent, state_of(dit, seed).latent)


@pytest.mark.parametrize("count", BATCHES)
@pytest.mark.parametrize("precision", PRECISIONS, ids=lambda precision: precision.name)
def test_images_of_a_step_have_the_bits_of_each_alone(precision: Precision, count: int) -> None:
    assert_as_alone(dit_of(precision), range(count))


@pytest.mark.parametrize("values", [torch.int8, torch.float8_e4m3fn], ids=["int8", "e4m3"])
def test_with_weights_in_8_bits(values: torch.dtype) -> None:
    assert_as_alone(DiT(CONFIG, quantized(weights(FP32).items(), values)), range(4))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("prediction", [GUIDED, CONDITIONAL])
def test_steps_of_the_fast_tier(prediction: str, solver: str) -> None:
    assert_as_alone(dit_of(FP32), range(4), ShortStep(prediction, kept=True, solver=SOLVERS[solver]))


def test_images_without_guidance_share_with_those_that_have_it() -> None:
    dit = dit_of(FP32)
    states = [state_of(dit, seed) for seed in range(4)]
    states[1:3] = [replace(state, condition=state.condition.unguided) for state in states[1:3]]
    inputs = [StepInput(s.model_input, s.tables.at(s.index), s.condition) for s in states]
    for found, given in zip(dit.predict_each(inputs), inputs, strict=True):
        assert torch.equal(found, dit.predict(given.latent, given.modulation, given.condition))


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_a_product_whose_bits_depend_on_the_rows_takes_one_image_at_a_time(batch_invariant: bool) -> None:
    """As a library's may. Where it is said not to, all images are in one call, and their bits are lost."""
    rows: list[int] = []

    def depends_on_rows(call: Any) -> Tensor:
        rows.append(call.x.numel() // call.x.shape[-1])
        exact = call.x @ call.weight.T * (1 + 1e-5 * rows[-1])
        result: Tensor = call.out.copy_(exact if call.bias is None else exact + call.bias)
        return result

    dit, seeds = dit_of(FP32), [3, 4, 5]
    together, alone = ([state_of(dit, seed) for seed in seeds] for _ in range(2))
    stand_in = Implementation("stand-in", depends_on_rows, batch_invariant=batch_invariant)
    with ops.all_ops()["linear"].forcing(stand_in):
        guided_step(dit, together)
        calls = len(rows)
        for state in alone:
            guided_step(dit, [state])
    same = [torch.equal(a.latent, b.latent) for a, b in zip(together, alone, strict=True)]
    products = PRODUCTS * CONFIG.num_layers
    assert (calls, same) == (products, [False] * 3) if batch_invariant else (3 * products, [True] * 3)


def test_a_step_of_two_kinds_that_fails_says_who_made_it() -> None:
    def steps(kind: str, states: list[SimpleNamespace]) -> None:
        if kind == "fails":
            raise MemoryError
        for state in states:
            state.latent += 1

    def image(kind: str) -> SimpleNamespace:
        state = SimpleNamespace(latent=torch.zeros(1))
        ahead = SimpleNamespace(step=lambda: None)
        return SimpleNamespace(
            _steps=steps, _kinds=[kind], _state=state, _ahead=ahead, _before=torch.zeros(1), done=0
        )

    images = [image(kind) for kind in ("works", "fails", "works")]
    with pytest.raises(MemoryError):
        step_together(images)
    assert [each.done for each in images] == [1, 0, 1]
    assert [each._state.latent.item() for each in images] == [1, 0, 1]
