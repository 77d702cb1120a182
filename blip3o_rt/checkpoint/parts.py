"""The parts a model is made of: the tensors of each, where they are published, and how they are made."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from blip3o_rt.ar import layout as ar
from blip3o_rt.checkpoint.tensor_file import StoredTensor, Tensors, filled, whole_tensor
from blip3o_rt.config import ModelConfig
from blip3o_rt.connector.layout import layout as connector_layout
from blip3o_rt.dit import layout as dit
from blip3o_rt.errors import CheckpointError
from blip3o_rt.ops.dtypes import E4M3
from blip3o_rt.precision import Precision, precision_of
from blip3o_rt.switches import AR_WEIGHTS, DIT_WEIGHTS, FP8, INT8, NO_SWITCHES
from blip3o_rt.tatok.layout import layout as ta_tok_layout
from blip3o_rt.vae.layout import layout as vae_layout
from blip3o_rt.weights import TensorSpec, concatenate_rows

PREFIXES = {
    "ar": "model.",
    "connector": "model.",
    "dit": "model.sana.",
    "vae": "model.sana_vae.",
    "ta_tok": "model.vision_tower.vision_tower.",
}
HEAD = "lm_head.weight"  # the one tensor of the decoder that stands outside `model.`

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SAMPLE = 2**16  # elements of a tensor that are looked at for zeros
LEAST_FILLED = 100  # of so many elements of a weight, one at least is not zero
LARGEST_TRAINED = 1e6  # of any trained weight, with room: float16 ends at 65504
VALUES = {INT8: torch.int8, FP8: E4M3}  # of matrices that a switch keeps in 8 bits
Quantizer = Callable[[Iterable[tuple[str, Tensor]]], dict[str, Tensor]]
# What makes the tensors of a part for a setting of a switch from those without it.
QUANTIZERS: dict[tuple[str, str], tuple[str, Quantizer]] = {
    (AR_WEIGHTS, INT8): ("ar", ar.quantized),
    (AR_WEIGHTS, FP8): ("ar", partial(ar.quantized, values=E4M3)),
    (DIT_WEIGHTS, INT8): ("dit", dit.quantized),
    (DIT_WEIGHTS, FP8): ("dit", partial(dit.quantized, values=E4M3)),
}


def layouts(config: ModelConfig, switches: Mapping[str, str] = NO_SWITCHES) -> dict[str, list[TensorSpec]]:
    """Part name -> all its runtime tensors, of the fast tier with the given switches.

    "ta_tok" is absent where the model has no vision tower.
    """
    parts = {
        "ar": ar.layout(config.ar, values=VALUES.get(switches.get(AR_WEIGHTS, ""))),
        "connector": connector_layout(config),
        "dit": dit.layout(config.dit, values=VALUES.get(switches.get(DIT_WEIGHTS, ""))),
        "vae": vae_layout(config.vae),
    }
    if config.ta_tok is not None:
        parts["ta_tok"] = ta_tok_layout(config.ta_tok)
    return parts


def weight_bytes(
    config: ModelConfig, dtype: torch.dtype | Precision, switches: Mapping[str, str] = NO_SWITCHES
) -> dict[str, int]:
    """Part name -> bytes its runtime tensors take in a dtype or a precision."""
    precision = precision_of(dtype)
    return {
        part: sum(
            math.prod(spec.shape) * (spec.dtype or spec.model_dtype(precision)).itemsize for spec in specs
        )
        for part, specs in layouts(config, switches).items()
    }


def layout_fingerprint(config: ModelConfig, switches: Mapping[str, str] = NO_SWITCHES) -> str:
    """A hash of how every runtime tensor is made.

    It changes when a tensor is made by another function, even under the same name and shape. What a function
    does is not in it: rename a function that is to arrange a tensor in another way.
    """
    recipes = [
        (
            part,
            spec.name,
            spec.shape,
            str(spec.dtype),
            [(s.name, s.shape) for s in spec.sources],
            _name(spec.combine),
            *([_name(spec.rows)] if spec.rows is not None else []),
        )
        for part, specs in layouts(config, switches).items()
        for spec in specs
    ]
    return hashlib.sha256(json.dumps(recipes).encode()).hexdigest()


def _name(function: Callable[..., object]) -> str:
    if isinstance(function, partial):
        return f"{_name(function.func)} {function.args} {sorted(function.keywords.items())}"
    return f"{function.__module__}.{function.__qualname__}"


def published_name(part: str, source: str) -> str:
    """Name of a part's original tensor in a published model.safetensors."""
    return HEAD if source == HEAD and part == "ar" else PREFIXES[part] + source


@dataclass(frozen=True)
class PartSource:
    """Where one part's published tensors are.

    Attributes:
        part: Its name.
        tensors: All tensors of the files that hold it.
        where: The folder or file, for messages.
        prefixed: Whether names begin with the part's prefix there.
    """

    part: str
    tensors: Tensors
    where: str
    prefixed: bool

    def name(self, source: str) -> str:
        """A tensor's name in the files."""
        return published_name(self.part, source) if self.prefixed else source


Extremes = dict[str, float]  # tensors with values that no training leaves, and the largest of these


def pieces(source: PartSource, spec: TensorSpec, dtype: torch.dtype, extremes: Extremes) -> Iterator[Tensor]:
    """A runtime tensor's elements in order, as contiguous one-dimensional pieces of its final dtype.

    Where the sources are only put one after another, no more than one piece is ever in memory; a tensor that
    is rearranged (the autoencoder's convolutions and grouped projections) or computed (TA-Tok's codebook) is
    made whole. A piece may be overwritten when the next is taken.
    Every value is looked at: it must be finite, also in the final dtype. `extremes` is added to.
    Raises CheckpointError.
    """
    final = spec.dtype or dtype
    limit = dtype if spec.rows is not None else final
    stored = [source.tensors[source.name(original.name)] for original in spec.sources]
    if spec.rows is not None and spec.combine is concatenate_rows:
        for tensor in stored:
            for block in row_blocks(tensor, _sound_chunks(tensor, limit, extremes)):
                yield spec.rows(block.to(dtype)).to(final).reshape(-1)
    elif spec.combine is concatenate_rows:
        for tensor in stored:
            for piece in _sound_chunks(tensor, limit, extremes):
                yield piece.to(final)
    else:
        whole = [whole_tensor(tensor, _sound_chunks(tensor, limit, extremes)) for tensor in stored]
        made = spec.build(whole, dtype).reshape(-1)
        if not torch.stack(torch.aminmax(made)).isfinite().all():
            raise CheckpointError(
                f"{stored[0].path}: {stored[0].name!r} leads to numbers that are not finite"
            )
        yield made


def assemble(source: PartSource, spec: TensorSpec, dtype: torch.dtype, extremes: Extremes) -> Tensor:
    """A whole runtime tensor in memory; `extremes` is added to."""
    return filled(spec.shape, spec.dtype or dtype, pieces(source, spec, dtype, extremes))


def extreme_values(extremes: Extremes) -> list[str]:
    """At most one warning, which sums up the tensors with values that no training leaves."""
    if not extremes:
        return []
    name, value = max(extremes.items(), key=lambda item: item[1])
    others = f" (and {len(extremes) - 1} other tensors)" if len(extremes) > 1 else ""
    return [
        f"{name}{others} holds values as large as {value:.3g}: the file is damaged, or its training diverged"
    ]


def may_be_zero(name: str) -> bool:
    """Whether training can leave a tensor at zero: biases, but no matrix and no weight of a norm."""
    return name.endswith(".bias")


def row_blocks(stored: StoredTensor, chunks: Iterator[Tensor]) -> Iterator[Tensor]:
    """A matrix's rows in order, as many whole ones at a time as are read."""
    width = math.prod(stored.shape[1:])  # a 1x1 convolution is a matrix
    rest: Tensor | None = None
    for piece in chunks:
        joined = piece if rest is None else torch.cat([rest, piece])
        whole = joined.numel() // width * width
        if whole:
            yield joined[:whole].reshape(-1, width)
        rest = joined[whole:].clone() if whole < joined.numel() else None


def _sound_chunks(stored: StoredTensor, limit: torch.dtype, extremes: Extremes) -> Iterator[Tensor]:
    """A tensor's chunks.

    Raises CheckpointError for what is not finite in `limit`; after the last chunk also for a weight that a
    sample of its elements shows to be zero throughout, or all but so.
    """
    where = f"{stored.path}: tensor {stored.name!r}"
    stride = max(1, math.prod(stored.shape) // SAMPLE)
    sampled = filled = 0
    for piece in stored.chunks():
        ends = torch.stack(torch.aminmax(piece))
        if not ends.isfinite().all():
            raise CheckpointError(
                f"{where} contains NaN or infinity; accepted: finite numbers (the file is damaged, or its "
                "training diverged)"
            )
        if not ends.to(limit).isfinite().all():
            raise CheckpointError(f"{where} has numbers beyond the range of {limit}; accepted: smaller ones")
        largest = float(ends.abs().max())
        if largest > LARGEST_TRAINED:
            extremes[stored.name] = max(largest, extremes.get(stored.name, 0.0))
        sample = piece[::stride]
        sampled, filled = sampled + sample.numel(), filled + int(sample.count_nonzero())
        yield piece
    if not may_be_zero(stored.name) and filled * LEAST_FILLED < sampled:
        raise CheckpointError(
            f"{where} is zero (all but {filled} of {sampled} numbers looked at); copy or download it again"
        )
