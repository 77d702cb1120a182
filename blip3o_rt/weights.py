"""How a runtime tensor is made from the tensors of a published checkpoint, and matrices in 8 bits."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from blip3o_rt.ops.dtypes import largest_value
from blip3o_rt.precision import Precision

ROWS_AT_ONCE = 4096  # that exist in float32
SCALE = "_scale"  # appended to the name of a matrix
RowMaker = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class SourceTensor:
    """One tensor of the original layout, named within its part (the part's prefix is stripped)."""

    name: str
    shape: tuple[int, ...]


def concatenate_rows(tensors: Sequence[Tensor]) -> Tensor:
    """Stack the sources along their first dimension; a single source is returned as it is."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim=0)


@dataclass(frozen=True)
class TensorSpec:
    """One runtime tensor: its name and shape, its sources, and how they combine.

    `combine` receives the source tensors in order; its result is viewed as `shape`.
    `dtype` None means the model's dtype (see `model_dtype`); otherwise the tensor is kept in that dtype.
    `rows`, where given, is applied to the combined matrix in the model's dtype, and may be applied to blocks
    of its rows instead.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[SourceTensor, ...]
    combine: Callable[[Sequence[Tensor]], Tensor] = concatenate_rows
    dtype: torch.dtype | None = None
    rows: Callable[[Tensor], Tensor] | None = None

    def model_dtype(self, precision: Precision) -> torch.dtype:
        """The weights' dtype for a matrix and what is made of one, the arithmetic's for any other tensor."""
        is_matrix = self.rows is not None or len(self.shape) == 2
        return precision.weights if is_matrix else precision.arithmetic

    def build(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Combine source tensors (already of the sources' shapes) into the runtime tensor."""
        combined = self.combine(tensors)
        if self.rows is not None:
            combined = self.rows(combined.to(dtype).flatten(1))
        return combined.reshape(self.shape).to(self.dtype or dtype).contiguous()


def direct(name: str, *shape: int) -> TensorSpec:
    """A tensor taken over under its own name and shape."""
    return TensorSpec(name, shape, (SourceTensor(name, shape),))


def affine(name: str, rows: int, *columns: int) -> list[TensorSpec]:
    """A weight [rows, *columns] and a bias [rows], of a layer or a norm of that name."""
    return [direct(name + ".weight", rows, *columns), direct(name + ".bias", rows)]


def weight_and_bias(weights: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """The tensors of a layer or a norm of that name, which `affine` describes."""
    return weights[name + ".weight"], weights[name + ".bias"]


def packed(name: str, rows: Sequence[tuple[str, int]], *columns: int) -> TensorSpec:
    """Several tensors [rows_i, *columns] concatenated along the rows."""
    sources = tuple(SourceTensor(source, (count, *columns)) for source, count in rows)
    return TensorSpec(name, (sum(count for _, count in rows), *columns), sources)


def reshaped(name: str, shape: tuple[int, ...], source_shape: tuple[int, ...]) -> TensorSpec:
    """A tensor stored under another shape with the same elements (a 1x1 convolution as a matrix)."""
    return TensorSpec(name, shape, (SourceTensor(name, source_shape),))


class UpdatableWeights(dict[str, Tensor]):
    """A part's runtime tensors, which can be overwritten, and what is hoisted from them."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(tensors)
        self._hoisted: list[tuple[Tensor, Callable[[], Tensor]]] = []

    def hoist(self, make: Callable[[], Tensor]) -> Tensor:
        """What `make` computes of the tensors, now and at every refresh."""
        self._hoisted.append((make(), make))
        return self._hoisted[-1][0]

    def refresh(self) -> None:
        """Compute anew what is hoisted, in the same memory."""
        for tensor, make in self._hoisted:
            found = make()
            if found.data_ptr() != tensor.data_ptr():
                tensor.copy_(found)


def hoisted(weights: Mapping[str, Tensor], make: Callable[[], Tensor]) -> Tensor:
    """What `make` computes of a part's weights, kept up to date where these can be updated."""
    return weights.hoist(make) if isinstance(weights, UpdatableWeights) else make()


def weights_sha256(weights: Mapping[str, Mapping[str, Tensor]]) -> str:
    """A hash that tells models apart by the first values of every tensor, in bfloat16 whatever their dtype.

    Reading every value would take as long as loading. Weights of 8 bits count as they are.
    """
    digest = hashlib.sha256()
    for part, tensors in sorted(weights.items()):
        for name, tensor in sorted(tensors.items()):
            first = tensor.flatten()[:256]
            plain = first.to(torch.bfloat16) if first.dtype in (torch.float32, torch.bfloat16) else first
            digest.update(f"{part} {name} {list(tensor.shape)}".encode())
            digest.update(plain.cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def row_scales(matrix: Tensor, values: torch.dtype = torch.int8) -> Tensor:
    """float32 [N], the scale of each row of a matrix [N, K]: max(abs(row)) / qmax; 0 for a zero row."""
    largest = torch.stack([matrix.amax(dim=1), -matrix.amin(dim=1)]).amax(dim=0)
    return largest.float() / largest_value(values)


def row_values(matrix: Tensor, values: torch.dtype = torch.int8) -> Tensor:
    """int8 or e4m3 [N, K], the quantized values: round(row / scale)."""
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


def quantized_tensors(
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
    """The specs; each matrix whose name ends in `endings` becomes two: 8-bit values, and a scale per row."""
    to_values: RowMaker = row_values if values == torch.int8 else partial(row_values, values=values)
    to_scales: RowMaker = row_scales if values == torch.int8 else partial(row_scales, values=values)
    for spec in specs:
        if not spec.name.endswith(endings):
            yield spec
            continue
        yield replace(spec, rows=to_values, dtype=values)
        yield replace(spec, name=spec.name + SCALE, shape=spec.shape[:1], rows=to_scales, dtype=torch.float32)
