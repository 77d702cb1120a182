"""The denoising loop against the same loop written with diffusers' model and scheduler."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SanaTransformer2DModel
from torch import Tensor

from blip3o_rt.config import DiTConfig, SchedulerConfig
from blip3o_rt.dit.conditioning import ConditionTokens
from blip3o_rt.dit.model import DiT
from blip3o_rt.dit.schedule import flow_schedule
from blip3o_rt.errors import ParameterError
from tests.dit.loop import denoise
from tests.dit.oracle import oracle, predict, relative_l2, runtime, small_config

FLOAT32_BOUND = 1e-5  # as for one prediction: the loop adds few roundings and its errors do not grow
CHANNELS = 4


def random_tokens(config: DiTConfig) -> ConditionTokens:
    generator = torch.Generator().manual_seed(1)
    conditional = torch.randn(9, config.caption_channels, generator=generator)
    null = torch.randn(2, config.caption_channels, generator=generator)
    return ConditionTokens(conditional, null, (5, 4))


def random_latents(*widths: int, height: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(1, CHANNELS, height, width, generator=generator) for width in widths]


def loop_of_diffusers(
    model: SanaTransformer2DModel,
    latent: Tensor,
    tokens: ConditionTokens,
    steps: int,
    guidance: float,
    reference: Tensor | None,
    axis: int,
) -> Tensor:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps).tolist())
    for timestep in scheduler.timesteps:
        seen = latent if reference is None else torch.cat([latent, reference], dim=axis)
        null, conditional = predict(model, seen, float(timestep), tokens).split(1)
        guided = (null + guidance * (conditional - null))[:, :CHANNELS, :, : latent.shape[3]]
        latent = scheduler.step(guided, timestep, latent).prev_sample
    return latent


def run(dit: DiT, noise: Tensor, steps: int = 3, guidance: float = 2.0, **options: object) -> Tensor:
    tables = dit.schedule_tables(flow_schedule(SchedulerConfig(shift=3.0), steps))
    condition = dit.condition(random_tokens(dit.config))
    return denoise(dit, noise, tables, condition, guidance, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("channels_in", "channels_out", "reference_width", "axis"),
    [
        pytest.param(4, 4, None, 1, id="text"),
        pytest.param(4, 4, 6, 3, id="reference as columns"),
        pytest.param(4, 4, 9, 3, id="reference of another width as columns"),
        pytest.param(8, 4, 6, 1, id="reference as channels"),
        pytest.param(8, 8, 6, 1, id="reference as channels, predicted too"),
    ],
)
@pytest.mark.parametrize(("steps", "guidance"), [(1, 2.0), (4, 2.0), (3, 1.0), (3, 5.5)])
def test_latent_equals_diffusers(
    channels_in: int, channels_out: int, reference_width: int | None, axis: int, steps: int, guidance: float
) -> None:
    config = small_config(in_channels=channels_in, out_channels=channels_out)
    model = oracle(config)
    noise, reference = random_latents(6, reference_width or 1)
    given = reference if reference_width else None
    found = run(runtime(config, model), noise, steps, guidance, reference_latent=given)
    expected = loop_of_diffusers(model, noise, random_tokens(config), steps, guidance, given, axis)
    assert found.shape == noise.shape
    assert found.is_contiguous()
    assert relative_l2(found, expected) < FLOAT32_BOUND


def test_noise_and_reference_are_left_as_they_were() -> None:
    config = small_config()
    noise, reference = random_latents(6, 6)
    before = noise.clone(), reference.clone()
    run(runtime(config, oracle(config)), noise)
    run(runtime(config, oracle(config)), noise, reference_latent=reference)
    assert torch.equal(noise, before[0])
    assert torch.equal(reference, before[1])


def test_latents_stay_float32_in_a_bfloat16_model() -> None:
    config = small_config()
    (noise,) = random_latents(6)
    assert run(runtime(config, oracle(config), torch.bfloat16), noise).dtype == torch.float32


@pytest.mark.parametrize(
    ("channels_in", "reference_shape"),
    [
        pytest.param(8, None, id="a reference is missing"),
        pytest.param(4, (1, 4, 6, 6), id="another height"),
        pytest.param(4, (1, 5, 5, 6), id="other channels"),
        pytest.param(4, (2, 4, 5, 6), id="two references"),
        pytest.param(8, (1, 4, 5, 7), id="another width as channels"),
        pytest.param(6, (1, 4, 5, 6), id="channels that do not add up"),
    ],
)
def test_latents_that_do_not_fit_are_refused(
    channels_in: int, reference_shape: tuple[int, ...] | None
) -> None:
    config = small_config(in_channels=channels_in)
    (noise,) = random_latents(6)
    reference = None if reference_shape is None else torch.zeros(reference_shape)
    with pytest.raises(ParameterError, match="input channels"):
        run(runtime(config, oracle(config)), noise, reference_latent=reference)
