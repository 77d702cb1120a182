"""The model that is measured: where its weights come from, and the parts of it that a stage needs."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from blip3o_rt.checkpoint.load import Checkpoint, load_checkpoint
from blip3o_rt.checkpoint.parts import QUANTIZERS, layouts
from blip3o_rt.checkpoint.source import Source
from blip3o_rt.config import ModelConfig
from blip3o_rt.measure import RANDOM_MODELS
from blip3o_rt.measure.random_checkpoint import folder_name, preset
from blip3o_rt.measure.random_tokenizer import write_tokenizer
from blip3o_rt.measure.validate.checkpoint import EDITING, named_checkpoint
from blip3o_rt.precision import Precision, precision_of
from blip3o_rt.switches import check_device, weight_switches
from blip3o_rt.weights import SourceTensor, TensorSpec

SEED = 0
NOISE = 2**24 + 43  # normal numbers that all random weights are taken from


@dataclass(frozen=True)
class Subject:
    """A model, and the precision and device it is measured in.

    Attributes:
        size: "published" or "tiny" (random weights of that geometry), "shapes" (the embedded model), or a
            checkpoint's path as the user gave it.
        folder: of the checkpoint; of the tokenizer where the weights are random.
        cache_dir: holds the converted form of a published checkpoint.
        switches: of the fast tier; none in the exact one.
        diffusion, ta_tok: as in `Source`.
    """

    size: str
    folder: Path
    precision: Precision
    device: torch.device
    cache_dir: Path
    switches: Mapping[str, str] = field(default_factory=dict)
    diffusion: Path | None = None
    ta_tok: Path | None = None

    def load(self, parts: Collection[str] | None = None) -> Checkpoint:
        """The named parts, all without names."""
        if self.size in RANDOM_MODELS:
            return self._random(parts)
        return load_checkpoint(
            Source(self.folder, self.diffusion, self.ta_tok),
            dtype=self.precision,
            device=self.device,
            cache_dir=self.cache_dir,
            parts=parts,
            switches=self.switches,
        )

    def _random(self, parts: Collection[str] | None) -> Checkpoint:
        """Weights made in memory on the device: no disk holds or reads them."""
        check_device(self.switches, self.device.type)
        config = self.config()
        quantizers = dict(QUANTIZERS[switch] for switch in weight_switches(self.switches).items())
        weights = {
            part: quantizers.get(part, dict)(random_weights(specs, self.precision, self.device).items())
            for part, specs in layouts(config).items()
            if parts is None or part in parts
        }
        return Checkpoint(
            config, weights, self.folder, self.precision, self.device, self.folder, dict(self.switches)
        )

    def config(self) -> ModelConfig:
        """The model's geometry."""
        return preset(self.size, EDITING) if self.size in RANDOM_MODELS else self.load(()).config


def random_weights(
    specs: Collection[TensorSpec], precision: Precision, device: torch.device
) -> dict[str, Tensor]:
    """Runtime tensors of seeded random weights, about the same model in each dtype and on every device.

    They are scaled (variance 1 / fan-in; norms about 1) so that activations stay sane.
    """
    noise = torch.randn(NOISE, generator=torch.Generator().manual_seed(SEED)).repeat(2)
    on_device = noise.to(device)
    found = {}
    for spec in specs:
        made_from = noise if spec.dtype is not None else on_device  # what is computed is computed by the host
        sources = [_random_source(source, made_from).to(precision.weights) for source in spec.sources]
        found[spec.name] = spec.build(sources, spec.model_dtype(precision)).to(device)
    return found


def _random_source(source: SourceTensor, noise: Tensor) -> Tensor:
    """A tensor of the published layout: consecutive noise from a place that its name decides."""
    count = math.prod(source.shape)
    place = int.from_bytes(hashlib.sha256(source.name.encode()).digest()[:4], "little") % NOISE
    whole, rest = divmod(count, NOISE)
    values = torch.cat([noise[place : place + NOISE]] * whole + [noise[place : place + rest]])
    if len(source.shape) > 1:
        return values.reshape(source.shape) / math.sqrt(math.prod(source.shape[1:]))
    return 1 + 0.1 * values if source.name.endswith("weight") else 0.02 * values


def prepare(
    size: str,
    dtype: torch.dtype | Precision,
    device: torch.device,
    work: Path,
    switches: Mapping[str, str] | None = None,
    diffusion: Path | None = None,
    ta_tok: Path | None = None,
) -> Subject:
    """The subject that `--model` names; the tokenizer of a random one is kept in the work folder.

    Raises CheckpointError where there is no such checkpoint.
    """
    if size in RANDOM_MODELS:
        folder = work / f"{folder_name(preset(size, EDITING))}-tokenizer"
        if not (folder / "tokenizer_config.json").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            write_tokenizer(folder, preset(size, EDITING))
    else:
        folder = named_checkpoint(size)
    cache = work / "converted-checkpoints"
    return Subject(size, folder, precision_of(dtype), device, cache, dict(switches or {}), diffusion, ta_tok)
