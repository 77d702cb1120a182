"""Parameters are refused at construction, in one line that says what was given and what is accepted."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blip3o_rt.errors import ParameterError
from blip3o_rt.params import (
    MAX_SEED,
    DiffusionParams,
    SamplingParams,
    check_max_batch,
    check_max_prompt_tokens,
    image_seeds,
)

NOT_INTEGERS = [True, 1.0, "1", None, float("nan"), [1]]
NOT_NUMBERS = [True, "1", None, 1j, float("nan"), float("inf"), -float("inf"), 10**400]


def refusal(make: type, **arguments: object) -> str:
    """The message with which the parameter is refused; one line, naming the parameter and the range."""
    with pytest.raises(ParameterError) as caught:
        make(**arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert "accepted is" in message
    assert message.startswith(next(iter(arguments)))
    return message


@pytest.mark.parametrize("value", [-1, MAX_SEED + 1, *NOT_INTEGERS])
def test_seed_out_of_range(value: object) -> None:
    assert "9223372036854775807" in refusal(SamplingParams, seed=value)


@pytest.mark.parametrize("value", [0, -0.5, 1e-6, 100.5, *NOT_NUMBERS])
def test_temperature_out_of_range(value: object) -> None:
    assert "top_k=1" in refusal(SamplingParams, temperature=value)


@pytest.mark.parametrize("value", [0, -0.1, 1.0000001, *NOT_NUMBERS])
def test_top_p_out_of_range(value: object) -> None:
    refusal(SamplingParams, top_p=value)


@pytest.mark.parametrize("value", [-1, 2**31, *(v for v in NOT_INTEGERS if v is not None)])
def test_top_k_out_of_range(value: object) -> None:
    refusal(SamplingParams, top_k=value)


@pytest.mark.parametrize("value", [1, 0, "yes", None])
def test_image_tokens_only_is_a_bool(value: object) -> None:
    with pytest.raises(ParameterError, match="image_tokens_only"):
        SamplingParams(image_tokens_only=value)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0, -1, 1001, *NOT_INTEGERS])
def test_steps_out_of_range(value: object) -> None:
    assert "1 to 1000" in refusal(DiffusionParams, steps=value)


@pytest.mark.parametrize("value", [-0.1, 100.1, *NOT_NUMBERS])
def test_guidance_out_of_range(value: object) -> None:
    assert "0 to 100" in refusal(DiffusionParams, guidance=value)


@pytest.mark.parametrize("n", [0, -1, 65, *NOT_INTEGERS])
def test_n_out_of_range(n: object) -> None:
    with pytest.raises(ParameterError, match=r"^n is .*: accepted is a whole number from 1 to 64$"):
        image_seeds(0, n)


def test_the_last_seed_must_fit() -> None:
    assert image_seeds(MAX_SEED - 3, 4)[-1] == MAX_SEED
    with pytest.raises(ParameterError, match=r"seed \+ n - 1"):
        image_seeds(MAX_SEED - 3, 5)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(
    seed=st.integers(0, MAX_SEED),
    temperature=st.floats(1e-5, 100),
    top_k=st.none() | st.integers(0, 2**31 - 1),
    top_p=st.floats(0, 1, exclude_min=True),
)
def test_values_in_range_are_kept(seed: int, temperature: float, top_k: int | None, top_p: float) -> None:
    params = SamplingParams(seed, temperature, top_k, top_p)
    assert (params.seed, params.temperature, params.top_k, params.top_p) == (seed, temperature, top_k, top_p)


def test_number_types_become_plain_ones() -> None:
    sampling = SamplingParams(
        seed=np.int64(3), temperature=np.float32(0.5), top_k=np.uint8(9), top_p=Fraction(1, 2)
    )
    assert sampling == SamplingParams(3, 0.5, 9, 0.5)
    assert [type(v) for v in dataclasses.astuple(sampling)] == [int, float, int, float, bool]
    assert [type(v) for v in dataclasses.astuple(DiffusionParams(np.int32(4), 3))] == [int, float]


def test_params_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        DiffusionParams().steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("top_k", "codes", "expected"),
    [
        (None, 65536, 1200),
        (None, 512, 9),
        (None, 16, 1),
        (None, 1, 1),
        (0, 512, 0),
        (1, 512, 1),
        (700, 512, 700),
    ],
)
def test_top_k_scales_to_the_codebook(top_k: int | None, codes: int, expected: int) -> None:
    assert SamplingParams(top_k=top_k).top_k_for(codes, vocab_size=700) == expected


def test_top_k_beyond_the_vocabulary() -> None:
    with pytest.raises(ParameterError, match=r"^top_k is 701: accepted is .* to 700, the vocabulary's size$"):
        SamplingParams(top_k=701).top_k_for(512, vocab_size=700)


@pytest.mark.parametrize("value", [1, 4, 256])
def test_a_batch_in_range_is_kept(value: int) -> None:
    assert check_max_batch(value) == value


@pytest.mark.parametrize("value", [0, -3, 257, 2.0, True, "4", None])
def test_a_batch_out_of_range_is_refused_in_one_line(value: object) -> None:
    with pytest.raises(ParameterError, match=r"^max_batch is .*: accepted is a whole number from 1 to 256$"):
        check_max_batch(value)


@pytest.mark.parametrize("value", [16, 1536, 1_000_000])
def test_prompt_positions_in_range_are_kept(value: int) -> None:
    assert check_max_prompt_tokens(value) == value


@pytest.mark.parametrize("value", [15, 0, -5, 1_000_001, 64.0, False, "64"])
def test_prompt_positions_out_of_range_are_refused_in_one_line(value: object) -> None:
    accepted = r"accepted is a whole number from 16 to 1000000$"
    with pytest.raises(ParameterError, match=rf"^max_prompt_tokens is .*: {accepted}"):
        check_max_prompt_tokens(value)
