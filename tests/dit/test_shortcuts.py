"""The denoising loop of the fast tier, against the exact one, diffusers' solver, and a closed solution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from blip3o_rt.config import SchedulerConfig
from blip3o_rt.dit.captured import CapturedImages, Geometry
from blip3o_rt.dit.denoise import Denoising
from blip3o_rt.dit.schedule import Schedule, flow_schedule
from blip3o_rt.dit.shortcuts import Shortcuts, ShortStep
from blip3o_rt.dit.solvers import EULER, SOLVERS, Levels, Solver
from blip3o_rt.dit.step import EagerSteps, StepState, guided_step
from blip3o_rt.errors import ParameterError
from blip3o_rt.graphs import GraphRunner
from blip3o_rt.switches import SOLVER, SWITCHES, check_switches, one_of
from tests.captured_graph import CapturedGraphs
from tests.dit.loop import denoise
from tests.dit.oracle import oracle, relative_l2, runtime, small_config
from tests.dit.test_denoise import random_latents, random_tokens

FLOAT32_BOUND = 1e-5  # as for one prediction: the loop adds few roundings and its errors do not grow
SIGMA_BOUND = 1e-6  # in float64 what is left is that noise levels are float32, whose logits are taken
SHAPE = (1, 4, 2, 3)
ORDERS = {"euler": 1, "dpm++": 2}  # of convergence, of every solver
NO_CONDITION = SimpleNamespace(unguided=None)

Velocity = Callable[[Tensor, Tensor], Tensor]  # of a latent and its noise level


def shortcuts(**switches: str) -> Shortcuts:
    return Shortcuts.of(check_switches(switches))


def with_solver(name: str) -> Shortcuts:
    """The steps of a solver; Euler's is the one without a switch."""
    return shortcuts() if SOLVERS[name] is EULER else shortcuts(solver=name)


def levels(steps: int, shift: float = 1.0) -> Schedule:
    return flow_schedule(SchedulerConfig(shift=shift), steps)


class Flow:
    """Stands in for the DiT: its prediction is a velocity in closed form, its modulation the noise level."""

    def __init__(self, velocity: Velocity) -> None:
        self.device, self.compute_dtype = torch.device("cpu"), torch.float64
        self.config = SimpleNamespace(in_channels=SHAPE[1])
        self.velocity, self.ran_at = velocity, []

    def predict_each(self, inputs: Sequence[Any]) -> list[Tensor]:
        (given,) = inputs  # its modulation is the noise level
        self.ran_at.append(round(float(given.modulation), 4))
        return [self.velocity(given.latent, given.modulation).repeat(2, 1, 1, 1)]

    def tables(self, schedule: Schedule) -> SimpleNamespace:
        return SimpleNamespace(
            schedule=schedule, at=lambda index: schedule.sigmas.double().index_select(0, index)[0]
        )


def flow(velocity: Velocity, chosen: Shortcuts, schedule: Schedule, noise: Tensor) -> tuple[Tensor, Flow]:
    dit = Flow(velocity)
    found = denoise(dit, noise, dit.tables(schedule), NO_CONDITION, 2.0, kinds=chosen.steps(schedule))  # type: ignore[arg-type]
    return found, dit


def noise() -> Tensor:
    return torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def wavy(latent: Tensor, sigma: Tensor) -> Tensor:
    return torch.sin(2 * latent) + sigma**2 * latent - 0.3


MEAN, DEVIATION = 0.7, 0.4


def of_a_normal(latent: Tensor, sigma: Tensor) -> Tensor:
    """The velocity where what is drawn is normal: noise minus image, as expected given the latent."""
    remaining = 1 - sigma
    variance = (remaining * DEVIATION) ** 2 + sigma**2
    denoised = MEAN + remaining * DEVIATION**2 / variance * (latent - remaining * MEAN)
    return (latent - denoised) / sigma


def of_diffusers(velocity: Velocity, schedule: Schedule, latent: Tensor) -> Tensor:
    scheduler = DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(schedule.steps)
    scheduler.sigmas = schedule.sigmas.double()
    scheduler.timesteps = 1000.0 * schedule.sigmas[:-1].double()
    for step, timestep in enumerate(scheduler.timesteps):
        prediction = velocity(latent, scheduler.sigmas[step])
        latent = scheduler.step(prediction, timestep, latent).prev_sample
    return latent


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_dpm_solver_equals_diffusers(steps: int, shift: float) -> None:
    schedule = levels(steps, shift)
    found, _ = flow(wavy, shortcuts(solver="dpm++"), schedule, noise())
    assert relative_l2(found, of_diffusers(wavy, schedule, noise())) < SIGMA_BOUND


def at_level(sigma: float) -> Tensor:
    """The solution for `of_a_normal` at a noise level: the noise scaled and moved to where latents are."""
    return (1 - sigma) * MEAN + (((1 - sigma) * DEVIATION) ** 2 + sigma**2) ** 0.5 * noise()


def error_of(chosen: Shortcuts, schedule: Schedule) -> float:
    first, last = float(schedule.sigmas[0]), float(schedule.sigmas[-1])
    found, _ = flow(of_a_normal, chosen, schedule, at_level(first))
    return float((found - at_level(last)).norm())


def test_every_solver_has_an_order() -> None:
    assert set(ORDERS) == set(SOLVERS)


@pytest.mark.parametrize("solver", ORDERS)
def test_order_of_convergence(solver: str) -> None:
    """Between two levels that have some of image and of noise: steps halved, the error 2^order less."""
    schedules = (Schedule(torch.linspace(0.9, 0.1, steps + 1), torch.empty(steps)) for steps in (20, 40, 80))
    errors = [error_of(with_solver(solver), schedule) for schedule in schedules]
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2 ** ORDERS[solver], rel=0.15)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_estimate_is_the_clean_latent_of_the_prediction(solver: str) -> None:
    """Whatever the solver adds to the step, and whatever steps come after."""
    dit, schedule = Flow(wavy), levels(6, 3.0)
    tables = dit.tables(schedule)
    state = StepState.begin(dit, noise(), tables, NO_CONDITION, 2.0)  # type: ignore[arg-type]
    image = Denoising(EagerSteps(dit), state, tables, with_solver(solver).steps(schedule))  # type: ignore[arg-type]
    found, expected = [], []
    for sigma in schedule.sigmas[:-1].double():
        expected.append(image.latent - sigma * wavy(image.latent, sigma))
        image.step()
        found.append(image.estimate)
    for estimate, clean in zip(found, expected, strict=True):
        assert relative_l2(estimate, clean) < SIGMA_BOUND


def test_a_solver_that_only_the_switch_knows_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    accepting = replace(SWITCHES[SOLVER], parse=one_of("dpm++", "unheard of"))
    monkeypatch.setattr("blip3o_rt.switches.SWITCHES", {**SWITCHES, SOLVER: accepting})
    with pytest.raises(ParameterError, match=r"^solver 'unheard of' is not in the table .*: euler, dpm\+\+$"):
        shortcuts(solver="unheard of")


class Unmoved(Solver):
    """Moves by one whatever the velocity is, and says that it was on its way to two."""

    def move(self, latent: Tensor, velocity: Tensor, levels: Levels, denoised: Tensor) -> Tensor:
        return torch.ones_like(latent)

    def estimate(self, start: Tensor, end: Tensor, here: Tensor, after: Tensor, denoised: Tensor) -> Tensor:
        return torch.full_like(end, 2.0)


@pytest.mark.parametrize("others", [{}, {"step_cache": "2", "guidance_interval": "0:0.5"}])
def test_a_solver_of_the_table_is_asked_for_move_and_estimate(
    monkeypatch: pytest.MonkeyPatch, others: dict[str, str]
) -> None:
    monkeypatch.setattr("blip3o_rt.dit.solvers.SOLVERS", {"dpm++": Unmoved()})
    dit, schedule = Flow(wavy), levels(3)
    tables = dit.tables(schedule)
    state = StepState.begin(dit, noise(), tables, NO_CONDITION, 2.0)  # type: ignore[arg-type]
    kinds = shortcuts(solver="dpm++", **others).steps(schedule)
    image = Denoising(EagerSteps(dit), state, tables, kinds)  # type: ignore[arg-type]
    for done in (1, 2, 3):
        image.step()
        torch.testing.assert_close(image.latent, noise() + done)
        assert torch.equal(image.estimate, torch.full(SHAPE, 2.0, dtype=torch.float64))


def test_dpm_solver_needs_fewer_steps() -> None:
    assert error_of(shortcuts(solver="dpm++"), levels(15)) < error_of(Shortcuts(), levels(60))


def test_guidance_interval_says_which_steps_are_guided() -> None:
    """Its ends belong to it."""
    schedule = levels(10)
    chosen = shortcuts(guidance_interval="0.3:0.8").steps(schedule)
    assert [kind is guided_step for kind in chosen] == [level in range(3, 9) for level in range(10, 0, -1)]
    for all_of_them in (shortcuts(guidance_interval="0:1"), shortcuts(step_cache="1"), Shortcuts()):
        assert all_of_them.kinds == (guided_step,)
        assert all_of_them.steps(schedule) == [guided_step] * 10


@pytest.mark.parametrize(
    ("every", "steps", "ran"),
    [
        ("2", 6, [6, 4, 2, 1]),
        ("3", 7, [7, 4, 1]),
        ("3", 6, [6, 3, 1]),
        ("4", 2, [2, 1]),
        ("10", 1, [1]),
    ],
)
def test_cached_steps_do_not_run_the_model(every: str, steps: int, ran: list[int]) -> None:
    _, dit = flow(wavy, shortcuts(step_cache=every), levels(steps), noise())
    assert dit.ran_at == [round(level / steps, 4) for level in ran]


def test_predictions_between_are_on_the_line_through_the_last_two() -> None:
    """Of a velocity that is a line in the noise level nothing is lost from the second run on; and before that
    the first one is kept."""
    schedule = levels(12, 3.0)

    def line(latent: Tensor, sigma: Tensor) -> Tensor:
        return torch.full_like(latent, 2.0) - 5.0 * sigma

    found, _ = flow(line, shortcuts(step_cache="3"), schedule, noise())
    sigmas = schedule.sigmas.double()
    used = torch.cat([sigmas[:1].expand(3), sigmas[3:-1]])
    expected = noise() + ((2.0 - 5.0 * used) * sigmas.diff()).sum()
    assert relative_l2(found, expected) < 1e-12


def test_switches_go_together() -> None:
    """Each kind of step is made, and the solution found."""
    chosen = shortcuts(guidance_interval="0:0.5", step_cache="2", solver="dpm++")
    kinds = chosen.steps(levels(30))
    assert {kind.name for kind in kinds} == {"guided_step", "conditional_step", "extrapolated_step"}
    assert set(kinds) == set(chosen.kinds)
    assert error_of(chosen, levels(30)) < error_of(Shortcuts(), levels(30))


class Small:
    """A small random DiT, and denoising with it."""

    def __init__(self, steps: int = 6, **switches: str) -> None:
        config = small_config()
        self.dit = runtime(config, oracle(config))
        self.schedule = levels(steps, 3.0)
        self.tables = self.dit.schedule_tables(self.schedule)
        self.condition = self.dit.condition(random_tokens(config))
        self.chosen = shortcuts(**switches)

    def __call__(self, guidance: float = 2.0, reference: Tensor | None = None) -> Tensor:
        (noise,) = random_latents(6)
        kinds = self.chosen.steps(self.schedule)
        return denoise(
            self.dit, noise, self.tables, self.condition, guidance, reference_latent=reference, kinds=kinds
        )


@pytest.mark.parametrize("switches", [{}, {"guidance_interval": "0:1"}, {"step_cache": "1"}])
def test_nothing_changes_where_nothing_is_left_out(switches: dict[str, str]) -> None:
    small = Small(**switches)
    (noise,) = random_latents(6)
    assert torch.equal(small(), denoise(small.dit, noise, small.tables, small.condition, 2.0))


def test_steps_of_the_fast_tier_that_leave_nothing_out_are_those_of_the_exact_one() -> None:
    """To rounding: the same guided prediction and Euler step in other operations."""
    small = Small()
    expected = small()
    small.chosen = SimpleNamespace(steps=lambda schedule: [ShortStep("guided", True, EULER)] * 6)  # type: ignore[assignment]
    assert relative_l2(small(), expected) < FLOAT32_BOUND


@pytest.mark.parametrize("beside", [False, True])
def test_no_guidance_at_all_is_a_guidance_of_one(beside: bool) -> None:
    """The interval of the level 0 alone, which no step begins at."""
    reference = random_latents(9)[0] if beside else None
    found = Small(guidance_interval="0:0")(5.0, reference)
    assert relative_l2(found, Small()(1.0, reference)) < FLOAT32_BOUND


ALL = {"guidance_interval": "0.2:0.8", "step_cache": "2", "solver": "dpm++"}


@pytest.mark.parametrize("name", ALL)
def test_a_switch_changes_the_latent(name: str) -> None:
    change = relative_l2(Small(**{name: ALL[name]})(), Small()())
    assert 1e-4 < change < 0.5


@pytest.mark.parametrize(
    "switches",
    [
        {"step_cache": "3"},
        *(ALL | {"solver": name} for name, solver in SOLVERS.items() if solver is not EULER),
    ],
)
def test_a_captured_image_equals_a_fresh_one_whatever_was_drawn_before(switches: dict[str, str]) -> None:
    """Its buffers are those of every image, and nothing of an earlier one is left: here of one that fails,
    and of one of a single step."""
    small = Small(**switches)
    (noise,) = random_latents(6)
    expected = small()
    hidden, tokens = torch.zeros(1, 1), random_tokens(small.dit.config)
    recorded = CapturedImages(
        small.dit,
        Geometry.of(noise, hidden, None, None),
        lambda hidden, seen: tokens,
        torch.float32,
        GraphRunner(CapturedGraphs()),
        small.chosen.kinds,
    )
    for start, steps in ((torch.full_like(noise, torch.nan), 6), (noise, 6), (noise, 1), (noise, 6)):
        tables, kinds = small.dit.schedule_tables(levels(steps, 3.0)), small.chosen.steps(levels(steps, 3.0))
        condition = recorded.images[0].condition(hidden)
        found = denoise(small.dit, start, tables, condition, 2.0, kinds=kinds, captured=recorded)
        assert torch.equal(found, expected) == (start is noise and steps == 6)
