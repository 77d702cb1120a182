"""Weights in 8 bits: every row of a matrix as int8 values and one scale, symmetric about zero."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from blip3o_rt.weights import TensorSpec

LARGEST = 127  # -128 is not used, so that the range is symmetric
ROWS_AT_ONCE = 4096  # that exist in float32
SCALE = "_scale"  # appended to the name of a matrix


def row_scales(matrix: Tensor) -> Tensor:
    """float32 [N] of a matrix [N, K]: what its largest element is of 127; 0 for a row of zeros."""
    largest = torch.stack([matrix.amax(dim=1), -matrix.amin(dim=1)]).amax(dim=0)
    return largest.float() / LARGEST


def row_values(matrix: Tensor) -> Tensor:
    """int8 [N, K]: the nearest multiples of each row's scale."""
    blocks = [_values(block) for block in matrix.split(ROWS_AT_ONCE)]
    return torch.cat(blocks) if len(blocks) > 1 else blocks[0]


def _values(matrix: Tensor) -> Tensor:
    scales = row_scales(matrix)
    inverse = torch.where(scales > 0, 1 / scales, 0)
    return (matrix.float() * inverse[:, None]).round_().clamp_(-LARGEST, LARGEST).to(torch.int8)


def in_8_bits(name: str, matrix: Tensor) -> dict[str, Tensor]:
    """The values and the scales of a matrix, by name."""
    return {name: row_values(matrix), name + SCALE: row_scales(matrix)}


def quantised(tensors: Iterable[tuple[str, Tensor]], endings: tuple[str, ...]) -> dict[str, Tensor]:
    """The runtime tensors of `quantised_specs` from the names and tensors of the specs themselves.

    No matrix is held longer than it takes, so that one read on the way makes room for the next.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors:
        found.update(in_8_bits(name, tensor) if name.endswith(endings) else {name: tensor})
    return found


def quantised_specs(specs: Iterable[TensorSpec], endings: tuple[str, ...]) -> Iterator[TensorSpec]:
    """The specs, of matrices with a name that ends so two: int8 values, and a float32 scale for each row."""
    for spec in specs:
        if not spec.name.endswith(endings):
            yield spec
            continue
        yield replace(spec, rows=row_values, dtype=torch.int8)
        yield replace(
            spec, name=spec.name + SCALE, shape=spec.shape[:1], rows=row_scales, dtype=torch.float32
        )


def dequantised(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The runtime tensors with int8 matrices as the numbers they stand for, in the dtype of the others."""
    kept = {name: tensor for name, tensor in weights.items() if not name.endswith(SCALE)}
    dtype = next(tensor.dtype for tensor in kept.values() if tensor.is_floating_point())
    return {
        name: (tensor * weights[name + SCALE][:, None]).to(dtype) if name + SCALE in weights else tensor
        for name, tensor in kept.items()
    }
