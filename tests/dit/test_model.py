"""The transformer against diffusers' SanaTransformer2DModel on random configurations, grids and conditions.

Bound in float32: 1e-5 relative L2. Both sides round every sublayer to 2^-24 and sum in different orders,
which amounts to 2e-6 over three blocks; a slip in the mathematics (a swapped chunk, a shifted row) shows at
1e-4 or more. Bound in bfloat16: the error diffusers makes in bfloat16.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blip3o_rt.config import DiTConfig
from blip3o_rt.dit.conditioning import ConditionTokens, ConstantNull, WeightedNull, condition_tokens
from blip3o_rt.dit.model import DiT
from blip3o_rt.dit.schedule import Schedule
from blip3o_rt.errors import ParameterError
from tests.dit.oracle import oracle, predict, relative_l2, runtime, small_config

FLOAT32_BOUND = 1e-5


def schedule(*timesteps: float) -> Schedule:
    times = torch.tensor(timesteps)
    return Schedule(torch.cat([times / 1000, torch.zeros(1)]), times)


def random_tokens(config: DiTConfig, length: int, counts: tuple[int, ...], seed: int = 1) -> ConditionTokens:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((length, config.caption_channels), (len(counts), config.caption_channels))
    conditional, null = (torch.randn(shape, generator=generator) for shape in shapes)
    return ConditionTokens(conditional, null, counts)


def random_latent(config: DiTConfig, height: int, width: int) -> torch.Tensor:
    patch = config.patch_size
    generator = torch.Generator().manual_seed(2)
    return torch.randn(1, config.in_channels, height * patch, width * patch, generator=generator)


def run(dit: DiT, latent: torch.Tensor, timestep: float, tokens: ConditionTokens) -> torch.Tensor:
    """The prediction at a timestep that is the second of its schedule."""
    tables = dit.schedule_tables(schedule(1000.0, timestep))
    return dit.predict(latent, tables.step(1), dit.condition(tokens))


@st.composite
def configs(draw: st.DrawFn) -> DiTConfig:
    return small_config(
        in_channels=draw(st.integers(1, 9)),
        out_channels=draw(st.integers(1, 6)),
        num_layers=draw(st.integers(1, 3)),
        num_heads=draw(st.integers(1, 4)),
        head_dim=draw(st.sampled_from([8, 16, 24, 32])),
        num_cross_heads=draw(st.integers(1, 4)),
        cross_head_dim=draw(st.sampled_from([4, 16, 28])),
        caption_channels=draw(st.integers(1, 40)),
        mlp_ratio=draw(st.sampled_from([1.0, 2.5, 3.3])),
        patch_size=draw(st.sampled_from([1, 1, 2])),
        attention_bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        norm_eps=draw(st.sampled_from([1e-6, 1e-3])),
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    config=configs(),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    length=st.integers(1, 40),
    counts=st.lists(st.integers(1, 50), min_size=1, max_size=4),
    timestep=st.floats(0, 1000, width=32),
)
def test_prediction_equals_diffusers(
    config: DiTConfig, height: int, width: int, length: int, counts: list[int], timestep: float
) -> None:
    model = oracle(config)
    tokens = random_tokens(config, length, tuple(counts))
    latent = random_latent(config, height, width)
    found = run(runtime(config, model), latent, timestep, tokens)
    assert relative_l2(found, predict(model, latent, timestep, tokens)) < FLOAT32_BOUND


@pytest.mark.parametrize(
    ("counts", "kind"), [((730,), ConstantNull), ((730, 1024), WeightedNull)], ids=["text", "edit"]
)
def test_null_half_equals_all_its_tokens_written_out(counts: tuple[int, ...], kind: type) -> None:
    config = small_config(num_layers=3)
    model = oracle(config)
    dit = runtime(config, model)
    tokens = random_tokens(config, sum(counts), counts)
    latent = random_latent(config, 7, 5)
    assert isinstance(dit.condition(tokens).null, kind)
    expected = predict(model, latent, 500.0, tokens)
    assert relative_l2(run(dit, latent, 500.0, tokens)[:1], expected[:1]) < FLOAT32_BOUND


@pytest.mark.parametrize(("num_heads", "cross_head_dim"), [(2, 32), (5, 32), (7, 112), (12, 64)])
def test_bfloat16_is_no_worse_than_diffusers(num_heads: int, cross_head_dim: int) -> None:
    config = small_config(
        num_heads=num_heads, cross_head_dim=cross_head_dim, caption_channels=96, num_layers=3
    )
    model = oracle(config).to(torch.bfloat16).float()  # weights that bfloat16 can hold
    tokens = random_tokens(config, 60, (40, 20))
    tokens = ConditionTokens(tokens.conditional.bfloat16(), tokens.null.bfloat16(), tokens.null_counts)
    exact_tokens = ConditionTokens(tokens.conditional.float(), tokens.null.float(), tokens.null_counts)
    latent = random_latent(config, 12, 10)
    exact = predict(model, latent, 700.0, exact_tokens)
    found = run(runtime(config, model, torch.bfloat16), latent, 700.0, tokens)
    theirs = predict(model.to(torch.bfloat16), latent.bfloat16(), 700.0, tokens)
    assert found.dtype == torch.float32
    assert relative_l2(found, exact) <= relative_l2(theirs, exact)


def test_timesteps_are_scaled_as_the_pipeline_of_diffusers_does() -> None:
    config = small_config(timestep_scale=0.25)
    model = oracle(config)
    tokens, latent = random_tokens(config, 5, (5,)), random_latent(config, 3, 4)
    found = run(runtime(config, model), latent, 800.0, tokens)
    assert relative_l2(found, predict(model, latent, 200.0, tokens)) < FLOAT32_BOUND


def test_a_steps_modulation_does_not_depend_on_the_other_steps() -> None:
    config = small_config()
    dit = runtime(config, oracle(config))
    tables = dit.schedule_tables(schedule(1000.0, 600.0, 200.0))
    second, on_device = tables.step(1), tables.at(torch.tensor([1]))
    assert second.blocks.shape == (config.num_layers, 6, config.width)
    assert second.final.shape == (2, config.width)
    alone = dit.schedule_tables(schedule(600.0)).step(0)
    torch.testing.assert_close(second.blocks, alone.blocks)
    torch.testing.assert_close(second.final, alone.final)
    assert torch.equal(second.blocks, on_device.blocks)
    assert torch.equal(second.final, on_device.final)


@pytest.mark.parametrize("counts", [(7,), (7, 3)], ids=["text", "edit"])
def test_without_a_null_half_the_conditional_half_is_predicted_alone(counts: tuple[int, ...]) -> None:
    """The same products of half as many rows: float32's rounding apart."""
    config = small_config(num_layers=3)
    dit = runtime(config, oracle(config))
    latent, condition = random_latent(config, 5, 6), dit.condition(random_tokens(config, 9, counts))
    modulation = dit.schedule_tables(schedule(600.0)).step(0)
    alone = dit.predict(latent, modulation, condition.unguided)
    assert alone.shape == (1, config.out_channels, 5, 6)
    assert relative_l2(alone, dit.predict(latent, modulation, condition)[1:]) < FLOAT32_BOUND


def test_condition_tokens_of_a_text_prompt() -> None:
    hidden = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    tokens = condition_tokens(hidden, lambda x: x + 1)
    assert torch.equal(tokens.conditional, hidden + 1)
    assert torch.equal(tokens.null, torch.ones(1, 3))  # zeros before the connector
    assert tokens.null_counts == (6,)


def test_condition_tokens_of_an_edit() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, latents = torch.randn(6, 3, generator=generator), torch.randn(2, 3, 4, 5, generator=generator)
    tokens = condition_tokens(hidden, lambda x: x + 1, latents, lambda x: 2 * x)
    assert tokens.conditional.shape == (6 + 2 * 4 * 5, 3)
    assert torch.equal(tokens.conditional[6 + 20 + 7], 2 * latents[1, :, 1, 2])
    assert torch.equal(tokens.null, torch.tensor([[1.0] * 3, [0.0] * 3]))  # zeros after the connector
    assert tokens.null_counts == (6, 40)


@pytest.mark.parametrize("counts", [(), (3,), (3, 0), (1, 1, 1)])
def test_null_counts_must_match_the_null_tokens(counts: tuple[int, ...]) -> None:
    config = small_config()
    tokens = random_tokens(config, 4, (1, 1))
    with pytest.raises(ParameterError, match="2 distinct null tokens"):
        runtime(config, oracle(config)).condition(ConditionTokens(tokens.conditional, tokens.null, counts))


@pytest.mark.parametrize("shape", [(2, 4, 4, 4), (1, 5, 4, 4), (1, 4, 3, 4), (1, 4, 4, 5)])
def test_latents_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    config = small_config(patch_size=2)
    dit = runtime(config, oracle(config))
    tables, condition = dit.schedule_tables(schedule(1.0)), dit.condition(random_tokens(config, 2, (2,)))
    with pytest.raises(ParameterError, match=r"\[1, 4, H, W\]"):
        dit.predict(torch.zeros(shape), tables.step(0), condition)
