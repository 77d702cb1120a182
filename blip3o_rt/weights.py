"""How a runtime tensor is made from the tensors of a published checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Source:
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
    `dtype` None means the model's dtype; otherwise the tensor is kept in that dtype.
    `rows`, where given, is applied to the combined matrix in the model's dtype, and may be applied to blocks
    of its rows instead.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[Source, ...]
    combine: Callable[[Sequence[Tensor]], Tensor] = concatenate_rows
    dtype: torch.dtype | None = None
    rows: Callable[[Tensor], Tensor] | None = None

    def build(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Combine source tensors (already of the sources' shapes) into the runtime tensor."""
        combined = self.combine(tensors)
        if self.rows is not None:
            combined = self.rows(combined.to(dtype).flatten(1))
        return combined.reshape(self.shape).to(self.dtype or dtype).contiguous()


def direct(name: str, *shape: int) -> TensorSpec:
    """A tensor taken over under its own name and shape."""
    return TensorSpec(name, shape, (Source(name, shape),))


def packed(name: str, rows: Sequence[tuple[str, int]], *columns: int) -> TensorSpec:
    """Several tensors [rows_i, *columns] concatenated along the rows."""
    sources = tuple(Source(source, (count, *columns)) for source, count in rows)
    return TensorSpec(name, (sum(count for _, count in rows), *columns), sources)


def reshaped(name: str, shape: tuple[int, ...], source_shape: tuple[int, ...]) -> TensorSpec:
    """A tensor stored under another shape with the same elements (a 1x1 convolution as a matrix)."""
    return TensorSpec(name, shape, (Source(name, source_shape),))


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
