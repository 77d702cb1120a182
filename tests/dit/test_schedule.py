"""The schedule and one Euler step against diffusers' FlowMatchEulerDiscreteScheduler, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from blip3o_rt import ops
from blip3o_rt.config import SchedulerConfig
from blip3o_rt.dit.schedule import flow_schedule
from blip3o_rt.errors import ParameterError


def oracle(config: SchedulerConfig, steps: int) -> FlowMatchEulerDiscreteScheduler:
    scheduler = FlowMatchEulerDiscreteScheduler(config.num_train_timesteps, config.shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps).tolist())
    return scheduler


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    steps=st.integers(1, 100),
    shift=st.sampled_from([1.0, 3.0, 0.5, 1.7]),
    num_train_timesteps=st.sampled_from([1000, 77]),
)
def test_schedule_equals_diffusers(steps: int, shift: float, num_train_timesteps: int) -> None:
    config = SchedulerConfig(num_train_timesteps, shift)
    schedule, expected = flow_schedule(config, steps), oracle(config, steps)
    assert schedule.steps == steps
    assert torch.equal(schedule.sigmas, expected.sigmas)
    assert torch.equal(schedule.timesteps, expected.timesteps)


def test_one_step_goes_from_noise_to_none() -> None:
    assert flow_schedule(SchedulerConfig(), 1).sigmas.tolist() == [1.0, 0.0]


def test_euler_steps_equal_diffusers() -> None:
    config = SchedulerConfig(shift=3.0)
    schedule, scheduler = flow_schedule(config, 7), oracle(config, 7)
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(1, 4, 5, 6, generator=generator)
    expected, guidance = latent, torch.tensor(2.0)
    for step, timestep in enumerate(schedule.timesteps):
        prediction = torch.randn(2, 4, 5, 6, generator=generator)
        guided = prediction[:1] + 2.0 * (prediction[1:] - prediction[:1])
        expected = scheduler.step(guided, timestep, expected).prev_sample
        latent = ops.guided_euler_step(latent, prediction, guidance, schedule.delta_sigmas[step])
        assert torch.equal(latent, expected)


def test_timesteps_of_the_published_code(reference_dir: Path) -> None:
    expected = load_file(reference_dir / "t2i" / "golden.safetensors")["timesteps"]
    assert torch.equal(flow_schedule(SchedulerConfig(), 30).timesteps, expected)


@pytest.mark.parametrize("steps", [0, -3])
def test_steps_below_one_are_refused(steps: int) -> None:
    with pytest.raises(ParameterError, match="at least 1"):
        flow_schedule(SchedulerConfig(), steps)
