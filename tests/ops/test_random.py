"""Philox against its published vectors and against C++; uniforms and normals by their distribution."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from blip3o_rt.ops import native, random

# Random123 (github.com/DEShawResearch/random123), tests/kat_vectors: philox4x32 with 10 rounds.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

SEEDS = st.integers(-(2**63), 2**63 - 1)
UINT32 = st.integers(0, 2**32 - 1)
few = settings(deadline=None, derandomize=True, max_examples=30)


def numbers(seed: int, stream: int, position: int, count: int) -> list[int]:
    found: list[int] = random.philox_uint32(
        torch.tensor([seed]), stream, torch.tensor([position]), count
    ).tolist()[0]
    return found


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, ...], answer: tuple[int, ...]) -> None:
    found = random.philox4x32(*([torch.tensor([v]) for v in words] for words in (counter, key)))
    assert tuple(int(word[0]) for word in found) == answer


@given(seed=SEEDS, stream=st.integers(0, 3), position=UINT32, count=st.integers(0, 50))
@few
def test_same_numbers_in_cpp(seed: int, stream: int, position: int, count: int) -> None:
    module = native.cpu_module()
    if module is None:
        pytest.skip(str(native.cpu_unavailable()))
    assert module.philox(seed % 2**64, stream, position, count) == numbers(seed, stream, position, count)


@given(seeds=st.lists(SEEDS, min_size=1, max_size=4), data=st.data(), count=st.integers(1, 30))
@few
def test_batched_token_uniforms_are_the_streams(seeds: list[int], data: st.DataObject, count: int) -> None:
    positions = [data.draw(st.integers(0, 2**31 - 1)) for _ in seeds]
    found = random.token_uniforms(torch.tensor(seeds), torch.tensor(positions, dtype=torch.int32), count)
    for row, seed, position in zip(found.numpy(), seeds, positions, strict=True):
        words = np.array(numbers(seed, random.TOKENS, position, count))
        np.testing.assert_array_equal(row, (words // 2**8 + 0.5) / 2**24)


def test_a_number_depends_on_its_index_alone() -> None:
    long = numbers(7, random.NOISE, 3, 1001)
    for count in (1, 2, 3, 4, 5, 1000):
        assert numbers(7, random.NOISE, 3, count) == long[:count]


def test_seed_stream_and_position_name_different_numbers() -> None:
    named = {(7, 1, 3), (8, 1, 3), (7 + 2**32, 1, 3), (-7, 1, 3), (7, 2, 3), (7, 1, 4)}
    assert len({tuple(numbers(*name, 4)) for name in named}) == len(named)


def test_uniforms_stay_inside_the_interval() -> None:
    extremes = random.as_uniform(torch.tensor([0, 0xFFFFFFFF]))
    assert extremes.tolist() == [0.5 * 2**-24, 1 - 0.5 * 2**-24]


def test_distributions() -> None:
    """Kolmogorov-Smirnov on a fixed seed: a p-value below 1e-3 would mean a wrong transform, not bad luck."""
    uniform = random.token_uniforms(torch.tensor([11]), torch.tensor([0]), 20000)[0]
    assert stats.kstest(uniform, "uniform").pvalue > 1e-3
    noise = random.normal_noise(11, (1, 4, 50, 100))
    assert noise.dtype == torch.float32
    assert noise.shape == (1, 4, 50, 100)
    assert stats.kstest(noise.numpy().reshape(-1), "norm").pvalue > 1e-3
    pairs = noise.reshape(-1, 2)
    assert abs(np.corrcoef(pairs.T.numpy())[0, 1]) < 0.03  # 3 sigma of 10,000 pairs


def test_noise_is_box_muller_of_stream_2() -> None:
    """A seed keeps its image only if stream, position and the order of the two branches stay."""
    uniform = [(word // 2**8 + 0.5) / 2**24 for word in numbers(-7, 2, 3, 6)]
    expected = []
    for first, second in zip(uniform[::2], uniform[1::2], strict=True):
        radius = math.sqrt(-2 * math.log(first))
        expected += [radius * math.cos(2 * math.pi * second), radius * math.sin(2 * math.pi * second)]
    found = random.normal_noise(-7, (2, 3), 3).flatten().tolist()
    assert found == pytest.approx(expected, rel=1e-6)  # rounded to float32 once


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (0, 4)])
def test_noise_of_any_shape_is_a_prefix(shape: tuple[int, ...]) -> None:
    noise = random.normal_noise(5, shape)
    assert noise.shape == shape
    assert torch.equal(noise.reshape(-1), random.normal_noise(5, (64,))[: noise.numel()])


def test_noise_is_made_on_the_cpu_whatever_the_default_device_is() -> None:
    expected = random.normal_noise(7, (3, 5))
    with torch.device("meta"):
        found = random.normal_noise(7, (3, 5))
    assert torch.equal(found, expected)
