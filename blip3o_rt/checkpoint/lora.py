"""Merging a LoRA adapter, in PEFT's layout, into the matrices of a published checkpoint."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from blip3o_rt.checkpoint.parts import row_blocks
from blip3o_rt.checkpoint.published import PublishedCheckpoint
from blip3o_rt.checkpoint.published_config import ConfigFile
from blip3o_rt.checkpoint.source import PathName, checkpoint_folder
from blip3o_rt.checkpoint.tensor_file import WEIGHT_DTYPES, StoredTensor, read_safetensors, whole_tensor
from blip3o_rt.errors import CheckpointError, ParameterError, shown

FACTOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")


def merge_lora(published: PublishedCheckpoint, folder: PathName, scale: float = 1.0) -> PublishedCheckpoint:
    """The checkpoint with `scale` times an adapter's product added to its matrices, in float32.

    Raises:
        CheckpointError, ConfigError: An adapter that is not a plain LoRA, or not one of this checkpoint.
        ParameterError: A scale that is not a finite number.
    """
    number = isinstance(scale, int | float) and not isinstance(scale, bool)
    if not number or not abs(scale) <= sys.float_info.max:
        raise ParameterError(f"lora_scale is {shown(scale)}; accepted: a finite number")
    root = checkpoint_folder(folder)
    config = ConfigFile.read(root / "adapter_config.json")
    factor = scale * _factor(config)
    path = root / "adapter_model.safetensors"
    sides: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in read_safetensors(path).items():
        match = FACTOR.fullmatch(name)
        if match is None:
            raise CheckpointError(f"{path}: {name!r} is not merged; accepted: lora_A and lora_B of matrices")
        sides.setdefault(match["module"] + ".weight", {})[match["side"]] = tensor
    tensors = dict(published.sources["ar"].tensors)
    for name, pair in sides.items():
        known = name if name in tensors else f"model.{name}"
        if known not in tensors or len(pair) < 2:
            raise CheckpointError(
                f"{path}: {name!r} has no matrix in {published.path}, or one factor only; accepted: an "
                "adapter of this checkpoint"
            )
        tensors[known] = _merged(tensors[known], pair["A"], pair["B"], factor)
    sources = {
        part: replace(source, tensors=tensors) if source.prefixed else source
        for part, source in published.sources.items()
    }
    files = [*published.files, root / "adapter_config.json", path]
    return replace(published, sources=sources, files=files)


def _factor(config: ConfigFile) -> float:
    """What the product of the factors is multiplied with, by the adapter's own configuration."""
    config.choice("peft_type", ("LORA",))
    config.choice("bias", ("none",), "none")
    config.only(False, "use_dora", "fan_in_fan_out")
    config.only({}, "rank_pattern", "alpha_pattern")
    rank = config.integer("r")
    return config.number("lora_alpha") / (math.sqrt(rank) if config.boolean("use_rslora", False) else rank)


def _merged(base: StoredTensor, a: StoredTensor, b: StoredTensor, factor: float) -> StoredTensor:
    columns = math.prod(base.shape[1:])
    for side, shape in ((a, (a.shape[0], columns)), (b, (base.shape[0], a.shape[0]))):
        flat = (side.shape[0], math.prod(side.shape[1:]))  # a 1x1 convolution is a matrix
        if len(base.shape) < 2 or flat != shape or side.dtype not in WEIGHT_DTYPES:
            raise CheckpointError(
                f"{side.path}: {side.name!r} is {side.dtype} {list(side.shape)}; accepted: a float matrix of "
                f"{list(shape)}, for {base.name!r} of {list(base.shape)}"
            )
    return replace(base, dtype=torch.float32, read=partial(_added, base, a, b, factor))


def _added(
    base: StoredTensor, a: StoredTensor, b: StoredTensor, factor: float, every: int
) -> Iterator[Tensor]:
    down, up = (whole_tensor(side).float().flatten(1) for side in (a, b))
    done = 0
    for block in row_blocks(base, base.chunks()):
        rows = up[done : done + len(block)]
        done += len(block)
        yield torch.addmm(block.float(), rows, down, alpha=factor).reshape(-1)
