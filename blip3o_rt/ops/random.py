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

import numpy as np
import torch
from torch import Tensor

TOKENS = 1
"""Stream of the token draws; position is the index of the token within its image."""
NOISE = 2
"""Stream of the initial latent noise; position is 0."""

_MASK = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)  # key increments: golden ratio and sqrt(3) - 1, as fractions of 2^32


def philox4x32(counter: Sequence[Tensor], key: Sequence[Tensor]) -> list[Tensor]:
    """Four words of 32 bits from four counter words and two key words, elementwise and broadcast.

    Words are int64 tensors on any device, holding values below 2^32. (A 32 x 32 bit product fills 64 bits; in
    int64 it wraps to the same bits, and the masks undo the sign.)
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


def philox_uint32(seeds: Tensor, stream: int, positions: Tensor, count: int) -> Tensor:
    """The first `count` numbers of a stream, int64 [B, count], for seeds int64 [B] and positions int32 [B].

    Runs on the tensors' device.
    """
    blocks = torch.arange((count + 3) // 4, dtype=torch.int64, device=seeds.device)[None]
    seeds, positions = seeds.long()[:, None], positions.long()[:, None]
    counter = [blocks & _MASK, blocks >> 32, positions & _MASK, torch.full_like(blocks, stream)]
    words = philox4x32(counter, [seeds & _MASK, (seeds >> 32) & _MASK])
    return torch.stack(words, dim=-1).flatten(1)[:, :count]


def as_uniform(words: Tensor) -> Tensor:
    """Uniform numbers, exact in float64: (top 24 of 32 bits + 0.5) / 2^24, so never 0 and never 1."""
    return ((words >> 8).double() + 0.5) * 2.0**-24


def normal_noise(seed: int, shape: Sequence[int], position: int = 0) -> Tensor:
    """Standard normal noise, float32 on the CPU, by Box-Muller in float64 from the stream NOISE.

    Elements 2j and 2j + 1 (in row-major order) are the cosine and sine branch of the uniforms 2j and 2j + 1.
    """
    count = math.prod(shape)
    of_seed, of_position = (torch.tensor([number], device="cpu") for number in (seed, position))
    words = philox_uint32(of_seed, NOISE, of_position, count + count % 2)
    uniform = as_uniform(words).numpy().reshape(-1, 2)
    radius = np.sqrt(-2.0 * np.log(uniform[:, 0]))
    angle = 2.0 * np.pi * uniform[:, 1]
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    return torch.from_numpy(pairs.reshape(-1)[:count].astype(np.float32)).reshape(tuple(shape))


def token_uniforms(seeds: Tensor, positions: Tensor, count: int) -> Tensor:
    """Uniforms of the stream TOKENS for a batch: seeds int64 [B], positions int32 [B] -> float64 [B, count].

    Runs on the tensors' device.
    """
    return as_uniform(philox_uint32(seeds, TOKENS, positions, count))
