"""Weights in 8 bits: every row of a matrix as int8 or e4m3 values and one scale, symmetric about zero."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from blip3o_rt.ops.dtypes import largest_value
from blip3o_rt.weights import TensorSpec

ROWS_AT_ONCE = 4096  # that exist in float32
SCALE = "_scale"  # appended to the name of a matrix
RowMaker = Callable[[Tensor], Tensor]


def row_scales(matrix: Tensor, values: torch.dtype = torch.int8) -> Tensor:
    """float32 [N] of a matrix [N, K]: what its largest element is of the largest value; 0 for zeros."""
    largest = torch.stack([matrix.amax(dim=1), -matrix.amin(dim=1)]).amax(dim=0)
    return largest.float() / largest_value(values)


def row_values(matrix: Tensor, values: torch.dtype = torch.int8) -> Tensor:
    """int8 or e4m3 [N, K]: those whose multiples of each row's scale are the nearest."""
    blocks = [_values(block, values) for block in matrix.split(ROWS_AT_ONCE)]
    return torch.cat(blocks) if len(blocks) > 1 else blocks[0]


def _values(matrix: Tensor, values: torch.dtype) -> Tensor:
    scales, largest = row_scales(matrix, values), largest_value(values)
    inverse = torch.where(scales > 0, 1 / scales, 0)
    scaled = matrix.float() * inverse[:, None]
    return (scaled if values.is_floating_point else scaled.round_()).clamp_(-largest, largest).to(values)


def in_8_bits(name: str, matrix: Tensor, values: torch.dtype = torch.int8) -> dict[str, Tensor]:
    """The values and the scales of a matrix, by name."""
    return {name: row_values(matrix, values), name + SCALE: row_scales(matrix, values)}


def quantized(
    tensors: Iterable[tuple[str, Tensor]], endings: tuple[str, ...], values: torch.dtype = torch.int8
) -> dict[str, Tensor]:
    """The runtime tensors of `quantized_specs` from the names and tensors of the specs themselves.

    No matrix is held longer than it takes, so that one read on the way makes room for the next.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors:
        found.update(in_8_bits(name, tensor, values) if name.endswith(endings) else {name: tensor})
    return found


def quantized_specs(
    specs: Iterable[TensorSpec], endings: tuple[str, ...], values: torch.dtype = torch.int8
) -> Iterator[TensorSpec]:
    """The specs, of matrices with a name that ends so two: 8-bit values, and a float32 scale for each row."""
    to_values: RowMaker = row_values if values == torch.int8 else partial(row_values, values=values)
    to_scales: RowMaker = row_scales if values == torch.int8 else partial(row_scales, values=values)
    for spec in specs:
        if not spec.name.endswith(endings):
            yield spec
            continue
        yield replace(spec, rows=to_values, dtype=values)
        yield replace(spec, name=spec.name + SCALE, shape=spec.shape[:1], rows=to_scales, dtype=torch.float32)


def dequantized(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The runtime tensors with 8-bit matrices as the numbers they stand for, in the dtype of the others."""
    kept = {name: tensor for name, tensor in weights.items() if not name.endswith(SCALE)}
    dtype = next(t.dtype for name, t in kept.items() if t.is_floating_point() and name + SCALE not in weights)
    return {
        name: (tensor.float() * weights[name + SCALE][:, None]).to(dtype)
        if name + SCALE in weights
        else tensor
        for name, tensor in kept.items()
    }
