"""Philox against its published vectors and against C++; uniforms and normals by their distribution."""

from __future__ import annotations

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


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, ...], answer: tuple[int, ...]) -> None:
    in_numpy = random.philox4x32(
        *([np.array([v], dtype=np.uint64) for v in words] for words in (counter, key))
    )
    in_torch = random.philox4x32(*([torch.tensor([v]) for v in words] for words in (counter, key)))
    assert tuple(int(word[0]) for word in in_numpy) == answer
    assert tuple(int(word[0]) for word in in_torch) == answer


@given(seed=SEEDS, stream=st.integers(0, 3), position=UINT32, count=st.integers(0, 50))
@few
def test_same_numbers_in_cpp(seed: int, stream: int, position: int, count: int) -> None:
    module = native.cpu_module()
    if module is None:
        pytest.skip(str(native.cpu_unavailable()))
    expected = random.philox_uint32(seed, stream, position, count).tolist()
    assert module.philox(seed % 2**64, stream, position, count) == expected


@given(seeds=st.lists(SEEDS, min_size=1, max_size=4), data=st.data(), count=st.integers(1, 30))
@few
def test_batched_token_uniforms_are_the_streams(seeds: list[int], data: st.DataObject, count: int) -> None:
    positions = [data.draw(st.integers(0, 2**31 - 1)) for _ in seeds]
    found = random.token_uniforms(torch.tensor(seeds), torch.tensor(positions, dtype=torch.int32), count)
    for row, seed, position in zip(found.numpy(), seeds, positions, strict=True):
        np.testing.assert_array_equal(row, random.uniforms(seed, random.TOKENS, position, count))


def test_a_number_depends_on_its_index_alone() -> None:
    long = random.philox_uint32(7, random.NOISE, 3, 1001)
    for count in (1, 2, 3, 4, 5, 1000):
        np.testing.assert_array_equal(random.philox_uint32(7, random.NOISE, 3, count), long[:count])


def test_seed_stream_and_position_name_different_numbers() -> None:
    named = {(7, 1, 3), (8, 1, 3), (7 + 2**32, 1, 3), (-7, 1, 3), (7, 2, 3), (7, 1, 4)}
    assert len({random.philox_uint32(*name, 4).tobytes() for name in named}) == len(named)


def test_uniforms_stay_inside_the_interval() -> None:
    extremes = random.as_uniform(np.array([0, 0xFFFFFFFF], dtype=np.uint64))
    assert extremes.tolist() == [0.5 * 2**-24, 1 - 0.5 * 2**-24]


def test_distributions() -> None:
    """Kolmogorov-Smirnov on a fixed seed: a p-value below 1e-3 would mean a wrong transform, not bad luck."""
    assert stats.kstest(random.uniforms(11, random.TOKENS, 0, 20000), "uniform").pvalue > 1e-3
    noise = random.normal_noise(11, (1, 4, 50, 100))
    assert noise.dtype == torch.float32
    assert noise.shape == (1, 4, 50, 100)
    assert stats.kstest(noise.numpy().reshape(-1), "norm").pvalue > 1e-3
    pairs = noise.reshape(-1, 2)
    assert abs(np.corrcoef(pairs.T.numpy())[0, 1]) < 0.03  # 3 sigma of 10,000 pairs


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (0, 4)])
def test_noise_of_any_shape_is_a_prefix(shape: tuple[int, ...]) -> None:
    noise = random.normal_noise(5, shape)
    assert noise.shape == shape
    assert torch.equal(noise.reshape(-1), random.normal_noise(5, (64,))[: noise.numel()])
