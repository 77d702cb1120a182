"""The model that is measured: where its checkpoint lies, and the parts of it that a stage needs."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from blip3o_rt.checkpoint.convert import convert
from blip3o_rt.checkpoint.load import Checkpoint, load_checkpoint
from blip3o_rt.checkpoint.parts import dtype_name, weight_bytes
from blip3o_rt.checkpoint.source import Source
from blip3o_rt.config import ModelConfig
from blip3o_rt.embedded import embedded_checkpoint
from blip3o_rt.errors import CheckpointError
from blip3o_rt.machine import format_bytes
from blip3o_rt.measure.random_checkpoint import preset
from blip3o_rt.measure.validate.checkpoint import converted_folder, sized_checkpoint
from blip3o_rt.switches import NO_SWITCHES

RANDOM_SIZES = ("published", "tiny")
SHAPES = "shapes"


@dataclass(frozen=True)
class Subject:
    """A checkpoint on disk, and the dtype and device it is measured in.

    size: "published" or "tiny" (random weights of that geometry), "shapes" (the embedded model), or the
    checkpoint's path as the user gave it. cache_dir holds the converted form of a published checkpoint.
    switches: of the fast tier; none in the exact one. diffusion and ta_tok: as in `Source`.
    """

    size: str
    folder: Path
    dtype: torch.dtype
    device: torch.device
    cache_dir: Path
    switches: Mapping[str, str] = field(default_factory=dict)
    diffusion: Path | None = None
    ta_tok: Path | None = None

    def load(self, parts: Collection[str] | None = None) -> Checkpoint:
        """The named parts, all without names. On the CPU they are mapped: memory is taken by what is used."""
        return load_checkpoint(
            Source(self.folder, self.diffusion, self.ta_tok),
            dtype=self.dtype,
            device=self.device,
            cache_dir=self.cache_dir,
            parts=parts,
            switches=self.switches,
        )

    def config(self) -> ModelConfig:
        """The model's geometry."""
        return self.load(()).config


def prepare(
    size: str,
    dtype: torch.dtype,
    device: torch.device,
    work: Path,
    say: Callable[[str], None],
    switches: Mapping[str, str] = NO_SWITCHES,
    diffusion: Path | None = None,
    ta_tok: Path | None = None,
) -> Subject:
    """The subject that `--size` names; a random one is written into the work folder unless it is there.

    Raises CheckpointError where there is no such checkpoint or no room for a random one, or where a diffusion
    folder or ta_tok file is given with one that is not in the published layout.
    """
    folder = Path(size)
    if size in RANDOM_SIZES:
        folder = random_checkpoint(size, dtype, work, say)
    elif size == SHAPES:
        folder = embedded_checkpoint()
    elif not folder.is_dir():
        raise CheckpointError(
            f"size is {size!r}: accepted are published, shapes, tiny or a checkpoint's folder"
        )
    cache = work / "converted-checkpoints"
    return Subject(size, folder, dtype, device, cache, switches, diffusion, ta_tok)


def random_checkpoint(size: str, dtype: torch.dtype, work: Path, say: Callable[[str], None]) -> Path:
    """A converted checkpoint of seeded random weights: the same in every run and on every machine.

    It is drawn in bfloat16 whatever the dtype, so that both are the same model. The published form that it is
    converted from stays beside it.
    """
    name = dtype_name(dtype)
    converted = converted_folder(size, name, work)
    if converted.exists():
        return converted
    with sized_checkpoint(size, work, say) as published:
        needed, free = sum(weight_bytes(preset(size), dtype).values()), shutil.disk_usage(work).free
        if needed > free:
            raise CheckpointError(
                f"{work}: converting the checkpoint needs {format_bytes(needed)} on disk and "
                f"{format_bytes(free)} are free: name another folder with --work"
            )
        say(f"converting it to {converted}")
        convert(published, converted, dtype=name, progress=False)
    return converted
