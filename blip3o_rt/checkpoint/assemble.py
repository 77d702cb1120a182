"""Making runtime tensors from original ones, every name, shape and value checked, piece by piece."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator

import torch
from torch import Tensor

from blip3o_rt.checkpoint.original import OriginalCheckpoint, PartSource, TensorIndex
from blip3o_rt.checkpoint.parts import HEAD, PREFIXES, layouts
from blip3o_rt.checkpoint.tensor_file import WEIGHT_DTYPES
from blip3o_rt.errors import CheckpointError
from blip3o_rt.weights import Source, TensorSpec, concatenate_rows

# Tensors that a published checkpoint has and inference does not use.
_TOWER = re.escape(PREFIXES["ta_tok"])
UNUSED = re.compile(
    rf"lm_head\.weight$|.*rotary_emb\.inv_freq$|model\.sana\.patch_embed\.pos_embed$|.*position_ids$"
    rf"|model\.(und_image_vae|und_image_vae_as_noise|tar_siglip_features)_connector\."
    rf"|(?:{_TOWER})?(decoder|decode_task_layer|bottleneck\.out_linear|scale_layer|teacher)\."
    rf"|(?:{_TOWER})?encoder\.(post_layernorm|head|encoder\.layers)\."
    rf"|(?:{_TOWER})?bottleneck\.regularizer\.stochastic_temperature_inv$"
)


def check_tensors(checkpoint: OriginalCheckpoint) -> list[str]:
    """Check that every needed tensor is there, of the right shape and of a floating-point type.

    Returns one warning per tensor that is neither needed nor known to be unused. Raises CheckpointError.
    """
    used: dict[int, set[str]] = {}
    indexes: dict[int, TensorIndex] = {}
    specs = layouts(checkpoint.config)
    for part, source in checkpoint.sources.items():
        names = used.setdefault(id(source.index), set())
        indexes[id(source.index)] = source.index
        names.update(source.name(original.name) for spec in specs[part] for original in spec.sources)
    for part, source in checkpoint.sources.items():
        for spec in specs[part]:
            for original in spec.sources:
                _check_tensor(source, original, used[id(source.index)])
    spare_parts = tuple(
        PREFIXES[part] for part in ("dit", "vae", "ta_tok") if _is_elsewhere(checkpoint, part)
    )
    return [
        f"{name} is not known and was left out"
        for key, index in indexes.items()
        for name in sorted(set(index.shapes) - used[key])
        if not UNUSED.match(name) and not name.startswith(spare_parts)
    ]


def _is_elsewhere(checkpoint: OriginalCheckpoint, part: str) -> bool:
    """Whether the checkpoint's own copy of a part, if any, is not the one in use."""
    return part not in checkpoint.sources or not checkpoint.sources[part].prefixed


def _check_tensor(source: PartSource, original: Source, used: set[str]) -> None:
    name, shapes = source.name(original.name), source.index.shapes
    if name not in shapes:
        spare = difflib.get_close_matches(name, sorted(set(shapes) - used), n=1, cutoff=0.8)
        hint = f"; the closest unused name there is {spare[0]!r}" if spare else ""
        tied = " (absent only where tie_word_embeddings is true)" if name == HEAD else ""
        raise CheckpointError(
            f"{source.where}: tensor {name!r} of shape {list(original.shape)} is missing{tied}{hint}"
        )
    file = source.index.file(name)
    if shapes[name] != original.shape:
        raise CheckpointError(
            f"{file.path}: tensor {name!r} has shape {list(shapes[name])}; accepted: {list(original.shape)}, "
            "as the configuration files say"
        )
    if file.dtype(name) not in WEIGHT_DTYPES:
        raise CheckpointError(
            f"{file.path}: tensor {name!r} is stored as {file.dtype(name)}; accepted: floating point "
            "of 16, 32 or 64 bits"
        )


def pieces(source: PartSource, spec: TensorSpec, dtype: torch.dtype) -> Iterator[Tensor]:
    """A runtime tensor's elements in order, as contiguous one-dimensional pieces of its final dtype.

    Where the sources are only put one after another, no more than one piece is ever in memory; a tensor that
    is rearranged (the autoencoder's convolutions and grouped projections) or computed (TA-Tok's codebook) is
    made whole. A piece may be overwritten when the next is taken.
    Raises CheckpointError for a value that is not a finite number.
    """
    if spec.rows is not None and spec.combine is concatenate_rows:
        for original in spec.sources:
            for block in _row_blocks(source, original):
                yield spec.rows(block.to(dtype)).to(spec.dtype or dtype).reshape(-1)
    elif spec.combine is concatenate_rows:
        for original in spec.sources:
            for piece in _finite_chunks(source, original):
                yield piece.to(spec.dtype or dtype)
    else:
        originals = [_whole(source, original) for original in spec.sources]
        yield spec.build(originals, dtype).reshape(-1)


def assemble(source: PartSource, spec: TensorSpec, dtype: torch.dtype) -> Tensor:
    """A whole runtime tensor in memory."""
    tensor = torch.empty(spec.shape, dtype=spec.dtype or dtype)
    flat, filled = tensor.reshape(-1), 0
    for piece in pieces(source, spec, dtype):
        flat[filled : filled + piece.numel()] = piece
        filled += piece.numel()
    return tensor


def _whole(source: PartSource, original: Source) -> Tensor:
    name = source.name(original.name)
    tensor = torch.empty(original.shape, dtype=source.index.file(name).dtype(name))
    flat, filled = tensor.reshape(-1), 0
    for piece in _finite_chunks(source, original):
        flat[filled : filled + piece.numel()] = piece
        filled += piece.numel()
    return tensor


def _row_blocks(source: PartSource, original: Source) -> Iterator[Tensor]:
    """A matrix's rows in order, as many whole ones at a time as are read."""
    width = math.prod(original.shape[1:])  # a 1x1 convolution is a matrix
    rest: Tensor | None = None
    for piece in _finite_chunks(source, original):
        joined = piece if rest is None else torch.cat([rest, piece])
        whole = joined.numel() // width * width
        if whole:
            yield joined[:whole].reshape(-1, width)
        rest = joined[whole:].clone() if whole < joined.numel() else None


def _finite_chunks(source: PartSource, original: Source) -> Iterator[Tensor]:
    name = source.name(original.name)
    file = source.index.file(name)
    for piece in file.chunks(name):
        low, high = torch.aminmax(piece)
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise CheckpointError(
                f"{file.path}: tensor {name!r} contains NaN or infinity; accepted: finite numbers "
                "(the file is damaged, or its training diverged)"
            )
        yield piece
