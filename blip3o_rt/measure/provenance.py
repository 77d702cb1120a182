"""The head of every record: which machine, which versions, which commit and which command made it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from blip3o_rt import __version__
from blip3o_rt.files import replacing
from blip3o_rt.machine import cuda_status, gpus, memory, package_version, processor

if TYPE_CHECKING:
    from blip3o_rt.pipeline import Pipeline

RECORD_VERSION = 1
KINDS = ("bench", "validate", "score", "switches", "windows")
PACKAGES = ("torch", "transformers", "diffusers", "triton")
TORCH_LIMITS = ("ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA")
DECIDING = (*TORCH_LIMITS, "BLIP3O_CPU_ISA", "BLIP3O_OPS")  # variables of the environment
PACKAGE_FOLDER = Path(__file__).resolve().parents[1]


def record_head(kind: str, command: Sequence[str]) -> dict[str, Any]:
    """What every record begins with; its "complete" is False until the record is finished.

    kind: one of KINDS. command: the command line, word by word; those of DECIDING that are set come first.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}: accepted are {', '.join(KINDS)}")
    return {
        "kind": kind,
        "version": RECORD_VERSION,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": [*(f"{name}={os.environ[name]}" for name in DECIDING if name in os.environ), *command],
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "complete": False,
    }


def model_record(pipeline: Pipeline, checkpoint: str | Path | None) -> dict[str, Any]:
    """Which model was measured and how it ran, for the key "model". checkpoint: None is the embedded one."""
    return {
        "size": "shapes" if checkpoint is None else Path(checkpoint).name,
        "dtype": pipeline.precision,
        "tier": pipeline.tier,
        "device": str(pipeline.device),
        "threads": torch.get_num_threads(),
        "switches": pipeline.switches,
    }


def write_record(path: Path, data: Mapping[str, Any]) -> None:
    """Write a record: what is at the path is always a whole one. Raises ValueError for nan or inf."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def machine() -> dict[str, Any]:
    """What of the machine decides a time: processor, usable cores, bytes of memory, first GPU and driver."""
    found = processor()
    gpu = next(iter(gpus()), None) if cuda_status() is None else None
    return {
        "cpu": found.model,
        "cores": found.usable_cores,
        "memory_bytes": memory().total,
        "gpu": gpu.name if gpu is not None else None,
        "driver": driver() if gpu is not None else None,
        "instruction_sets": list(found.isa),
    }


def versions() -> dict[str, str | None]:
    """Versions of the runtime, of Python and of the packages a result may depend on; None: not installed."""
    packages = {name: package_version(name) for name in PACKAGES}
    return {"blip3o_rt": __version__, "python": platform.python_version(), **packages}


def driver() -> str | None:
    """The NVIDIA driver's version as nvidia-smi says it; None where it cannot be asked."""
    return _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def commit(folder: Path = PACKAGE_FOLDER) -> str | None:
    """The commit of the checkout that the package lies in, with "-dirty" where tracked files differ from it.

    None where the package is installed apart from its repository, or without git.
    """
    git = ("git", "-C", str(folder))
    if _first_line(*git, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None  # a repository around an installed package is somebody else's
    return _first_line(*git, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def _first_line(*command: str) -> str | None:
    """The first line that a command prints; None where it cannot be run, fails or prints nothing."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(result.stdout.splitlines()), None)
