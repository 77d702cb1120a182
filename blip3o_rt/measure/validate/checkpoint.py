"""The checkpoint that --model names: the embedded one, or seeded random weights, written when asked for."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from blip3o_rt.checkpoint.parts import weight_bytes
from blip3o_rt.config import EditConfig, ModelConfig
from blip3o_rt.embedded import embedded_checkpoint
from blip3o_rt.errors import CheckpointError
from blip3o_rt.machine import format_bytes
from blip3o_rt.measure import EMBEDDED_MODEL, RANDOM_MODELS
from blip3o_rt.measure.random_checkpoint import folder_name, preset, write_random_checkpoint

SEED, SHARDS = 0, 3
EDITING = EditConfig(use_und_image_vae=True, use_und_image_vae_as_noise=True)


@contextmanager
def model_checkpoint(model: str, work: Path | None, show: Callable[[str], None]) -> Iterator[Path]:
    """The folder of a checkpoint in the published layout; a random one is kept where a work folder is given.

    Without one it is what bench keeps, where that is there, or else written for as long as it is used.
    Raises CheckpointError where there is no such checkpoint, or no room for it.
    """
    if model not in RANDOM_MODELS:
        yield named_checkpoint(model)
        return
    with ExitStack() as stack:
        if work is None and random_folder(model, default_work_folder()).exists():
            work = default_work_folder()
        elif work is None:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="blip3o-rt-")))
        yield _random_checkpoint(preset(model, EDITING), random_folder(model, work), show)


def named_checkpoint(model: str) -> Path:
    """The folder of the embedded model, or the one named. Raises CheckpointError where there is none."""
    folder = embedded_checkpoint() if model == EMBEDDED_MODEL else Path(model)
    if not folder.is_dir():
        names = ", ".join((*RANDOM_MODELS, EMBEDDED_MODEL))
        raise CheckpointError(f"--model is {model!r}: accepted are {names} or a checkpoint's folder")
    return folder


def default_work_folder() -> Path:
    """Where bench keeps checkpoints between runs: in the folder of BLIP3O_CACHE, or the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "blip3o_rt"
    return Path(os.environ.get("BLIP3O_CACHE", default)) / "bench"


def random_folder(size: str, work: Path) -> Path:
    """Where the random checkpoint of a size is kept."""
    return work / folder_name(preset(size, EDITING))


def _random_checkpoint(config: ModelConfig, folder: Path, show: Callable[[str], None]) -> Path:
    """A seeded random checkpoint, written into the folder unless it is there."""
    work = folder.parent
    if folder.exists():
        return folder
    work.mkdir(parents=True, exist_ok=True)
    needed = sum(weight_bytes(config, torch.bfloat16).values())
    free = shutil.disk_usage(work).free
    if needed > free:
        raise CheckpointError(
            f"{work}: a random checkpoint needs {format_bytes(needed)} on disk and {format_bytes(free)} are "
            "free: name another folder with --work"
        )
    show(f"writing a random checkpoint of {format_bytes(needed)} to {folder}")
    partial = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    write_random_checkpoint(partial, config, seed=SEED, shards=SHARDS)
    partial.rename(folder)
    return folder
