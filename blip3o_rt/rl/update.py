"""New weights in place of those of a loaded pipeline: all of them or none, at the same addresses.

An update is staged first: names, shapes, dtypes and values are checked, and every runtime tensor is made as a
load makes it, packed and quantized. What is left to do while requests wait is copying.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from blip3o_rt.checkpoint.contents import UNUSED
from blip3o_rt.checkpoint.load import Checkpoint, open_checkpoint
from blip3o_rt.checkpoint.parts import HEAD, Extremes, PartSource, assemble, layouts, published_name
from blip3o_rt.checkpoint.tensor_file import CHUNK_BYTES, WEIGHT_DTYPES, StoredTensor
from blip3o_rt.errors import CheckpointError, ParameterError, shown
from blip3o_rt.params import check_dense
from blip3o_rt.weights import TensorSpec, UpdatableWeights, concatenate_rows

NewWeights: TypeAlias = "str | Path | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]"
Staged: TypeAlias = list[tuple[Tensor, Tensor]]  # tensors in use and what they become
WHERE = Path("update_weights")  # what messages name in place of a file
CHECKSUM_ELEMENTS = 2**22  # that are summed at a time


def overwrite(staged: Staged) -> None:
    """Copy. What interrupts it is raised at the end: no half of an update is left."""

    def copy() -> None:
        for target, value in staged:
            target.copy_(value)

    try:
        copy()
    except BaseException:
        copy()
        raise


class WeightStore:
    """The weights of a pipeline by part and runtime name, and how they are updated."""

    def __init__(
        self, checkpoint: Checkpoint, weights: Mapping[str, Mapping[str, Tensor]], version: int
    ) -> None:
        self._config, self._switches = checkpoint.config, checkpoint.switches
        self._precision, self._device = checkpoint.precision, checkpoint.device
        self.weights = {part: UpdatableWeights(tensors) for part, tensors in weights.items()}
        self.version = version

    def stage(self, new: NewWeights) -> Staged:
        """Check new weights and make what becomes of them, without a change to those in use.

        Raises CheckpointError or ParameterError for what cannot be used.
        """
        if isinstance(new, str | Path):
            return self._of_folder(new)
        return self._of_tensors(_named(new))

    def apply(self, staged: Staged) -> None:
        """Put staged weights in place and compute anew what is hoisted from them."""
        overwrite(staged)
        for part in self.weights.values():
            part.refresh()
        self.version += 1

    def checksum(self) -> str:
        """A hash of every byte of every weight, in hexadecimal."""
        digest = hashlib.sha256()
        for part, tensors in sorted(self.weights.items()):
            for name, tensor in sorted(tensors.items()):
                text = f"{part} {name} {list(tensor.shape)} {tensor.dtype} {_sum(tensor)}\n"
                digest.update(text.encode())
        return digest.hexdigest()

    def on(self, device: torch.device) -> dict[str, dict[str, Tensor]]:
        """The weights by part and name on a device, those that are there already as they are."""
        return {
            part: {name: tensor.to(device) for name, tensor in tensors.items()}
            for part, tensors in self.weights.items()
        }

    def _of_folder(self, folder: str | Path) -> Staged:
        opened = open_checkpoint(folder)
        if opened.config != self._config:
            raise CheckpointError(f"{folder}: another model; accepted: one of the configuration in use")
        loaded = opened.load(self._device, self._precision, switches=self._switches).weights
        return [
            (tensor, loaded[part][name])
            for part, tensors in self.weights.items()
            for name, tensor in tensors.items()
        ]

    def _of_tensors(self, new: dict[str, StoredTensor]) -> Staged:
        used: set[str] = set()
        staged: Staged = []
        extremes: Extremes = {}
        for part, specs in layouts(self._config, self._switches).items():
            source = PartSource(part, new, WHERE.name, prefixed=True)
            for spec in specs:
                names = [source.name(original.name) for original in spec.sources]
                used.update(names)
                for name, original in zip(names, spec.sources, strict=True):
                    if name in new and new[name].shape != original.shape:
                        raise CheckpointError(
                            f"{WHERE}: tensor {name!r} has shape {list(new[name].shape)}; "
                            f"accepted: {list(original.shape)}"
                        )
                for target, piece in _pieces(self.weights[part][spec.name], spec, names, new):
                    dtype = piece.model_dtype(self._precision)
                    staged.append((target, assemble(source, piece, dtype, extremes).to(self._device)))
        self._check_head(new, used)
        for name in sorted(set(new) - used):
            if not UNUSED.match(name):
                raise CheckpointError(
                    f"{WHERE}: tensor {name!r} is none of this model; accepted: the names of its published "
                    "checkpoint"
                )
        return staged

    def _check_head(self, new: dict[str, StoredTensor], used: set[str]) -> None:
        """A head beside a tied embedding must be the embedding."""
        if HEAD not in new or HEAD in used:
            return
        embedding = new.get(published_name("ar", "embed_tokens.weight"))
        same = (
            embedding is not None
            and embedding.shape == new[HEAD].shape
            and all(map(torch.equal, new[HEAD].chunks(), embedding.chunks()))
        )
        if not same:
            raise CheckpointError(
                f"{WHERE}: {HEAD!r} is tied to the embedding in this model; accepted: none, or the same "
                "numbers as the embedding given with it"
            )


def _named(new: object) -> dict[str, StoredTensor]:
    """The given tensors by name, as a file's. Raises ParameterError for what is no tensor."""
    accepted = "accepted is a folder, or tensors by their published names"
    try:
        tensors = dict(new)  # type: ignore[call-overload]
    except Exception:  # a caller's object raises anything
        raise ParameterError(f"weights is {shown(new)}: {accepted}") from None
    if not tensors:
        raise ParameterError(f"weights is empty: {accepted}")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ParameterError(f"weights has {shown(tensor)} under {shown(name)}: {accepted}")
        check_dense(f"weights[{name!r}]", tensor)
        if tensor.dtype not in WEIGHT_DTYPES:
            raise ParameterError(
                f"weights[{name!r}] is {tensor.dtype}: accepted is floating point of 16, 32 or 64 bits"
            )
    return {
        name: StoredTensor(WHERE, name, tuple(tensor.shape), tensor.dtype, partial(_chunks, tensor))
        for name, tensor in tensors.items()
    }


def _chunks(tensor: Tensor, every: int) -> Iterator[Tensor]:
    flat = tensor.detach().reshape(-1)
    for piece in flat.split(max(1, CHUNK_BYTES // tensor.dtype.itemsize))[::every]:
        yield piece.cpu()


def _pieces(
    current: Tensor, spec: TensorSpec, names: list[str], new: Mapping[str, StoredTensor]
) -> Iterator[tuple[Tensor, TensorSpec]]:
    """What of a runtime tensor is given: all of it, or the rows of some of its sources.

    Raises CheckpointError where it is computed of tensors that are not all given.
    """
    given = [name in new for name in names]
    if all(given):
        yield current, spec
    elif any(given) and spec.combine is concatenate_rows:
        first = 0
        for original, here in zip(spec.sources, given, strict=True):
            rows = slice(first, first := first + original.shape[0])
            if here:
                target = current[rows]
                yield target, replace(spec, shape=tuple(target.shape), sources=(original,))
    elif any(given):
        missing = names[given.index(False)]
        raise CheckpointError(
            f"{WHERE}: tensor {missing!r} is missing; accepted: it together with "
            f"{names[given.index(True)]!r}, which one is computed of"
        )


def _sum(tensor: Tensor) -> int:
    """A sum over all elements' bits, each times its place: an integer that any change moves."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = tensor.detach().reshape(-1).view(kinds[tensor.dtype.itemsize])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for first in range(0, len(flat), CHECKSUM_ELEMENTS):
        piece = flat[first : first + CHECKSUM_ELEMENTS].to(torch.int64)
        places = torch.arange(first + 1, first + 1 + len(piece), device=tensor.device)
        total += (piece * (2 * places + 1) + (piece * places >> 7)).sum()
    return int(total)
