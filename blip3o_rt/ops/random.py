"""All randomness of the runtime: Philox4x32-10 keyed by (seed, stream, position), the same bits everywhere.

Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3 (SC11). A block of four 32-bit numbers
is a pure function of a 128-bit counter and a 64-bit key, so any number can be computed alone, in any order,
on any device. Here

    counter = (block low 32, block high 32, position, stream)    key = (seed low 32, seed high 32)

and number i of a (seed, stream, position) is lane i % 4 of block i // 4. csrc/include/blip3o/philox.h is the
same function in C++.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

TOKENS = 1
"""Stream of the token draws; position is the index of the token within its image."""
NOISE = 2
"""Stream of the initial latent noise; position is 0."""

_MASK = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)  # key increments: golden ratio and sqrt(3) - 1, as fractions of 2^32

Words = Any
"""32-bit words as a numpy uint64 array or a torch int64 tensor."""


def philox4x32(counter: Sequence[Words], key: Sequence[Words]) -> list[Words]:
    """Four words of 32 bits from four counter words and two key words, elementwise and broadcast.

    Words are numpy uint64 arrays, or torch int64 tensors on any device, holding values below 2^32.
    (A 32 x 32 bit product fills 64 bits; in int64 it wraps to the same bits, and the masks undo the sign.)
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0 = c0 * _MULTIPLIERS[0]
        product1 = c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _MASK) ^ c1 ^ k0,
            product1 & _MASK,
            ((product0 >> 32) & _MASK) ^ c3 ^ k1,
            product0 & _MASK,
        )
        k0 = (k0 + _WEYL[0]) & _MASK
        k1 = (k1 + _WEYL[1]) & _MASK
    return [c0, c1, c2, c3]


def philox_uint32(seed: int, stream: int, position: int, count: int) -> NDArray[np.uint32]:
    """The first `count` numbers of (seed, stream, position). Seeds are taken modulo 2^64, positions 2^32."""
    blocks = np.arange((count + 3) // 4, dtype=np.uint64)
    counter = [blocks & _MASK, blocks >> 32, *(np.full_like(blocks, v & _MASK) for v in (position, stream))]
    key = [np.full_like(blocks, seed & _MASK), np.full_like(blocks, (seed >> 32) & _MASK)]
    return np.stack(philox4x32(counter, key), axis=-1).reshape(-1)[:count].astype(np.uint32)


def uniforms(seed: int, stream: int, position: int, count: int) -> NDArray[np.float64]:
    """`count` uniform numbers, exact in float64: (top 24 bits + 0.5) / 2^24, so never 0 and never 1."""
    return as_uniform(philox_uint32(seed, stream, position, count).astype(np.uint64))


def as_uniform(words: Any) -> Any:
    """32-bit words (numpy uint64 or torch int64) as float64 numbers strictly between 0 and 1."""
    top = words >> 8
    return ((top.double() if isinstance(top, Tensor) else top.astype(np.float64)) + 0.5) * 2.0**-24


def normal_noise(seed: int, shape: Sequence[int], position: int = 0) -> Tensor:
    """Standard normal noise, float32 on the CPU, by Box-Muller in float64 from the stream NOISE.

    Elements 2j and 2j + 1 (in row-major order) are the cosine and sine branch of the uniforms 2j and 2j + 1.
    """
    count = math.prod(shape)
    uniform = uniforms(seed, NOISE, position, count + count % 2).reshape(-1, 2)
    radius = np.sqrt(-2.0 * np.log(uniform[:, 0]))
    angle = 2.0 * np.pi * uniform[:, 1]
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    return torch.from_numpy(pairs.reshape(-1)[:count].astype(np.float32)).reshape(tuple(shape))


def token_uniforms(seeds: Tensor, positions: Tensor, count: int) -> Tensor:
    """Uniforms of the stream TOKENS for a batch: seeds int64 [B], positions int32 [B] -> float64 [B, count].

    Runs on the tensors' device.
    """
    blocks = torch.arange((count + 3) // 4, dtype=torch.int64, device=seeds.device)[None]
    seeds, positions = seeds.long()[:, None], positions.long()[:, None]
    counter = [blocks & _MASK, blocks >> 32, positions & _MASK, torch.full_like(blocks, TOKENS)]
    words = philox4x32(counter, [seeds & _MASK, (seeds >> 32) & _MASK])
    return as_uniform(torch.stack(words, dim=-1).reshape(seeds.shape[0], -1)[:, :count])
