"""The model that comes with the package, so that a fresh machine can draw without a download."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path

from blip3o_rt import __version__
from blip3o_rt.checkpoint.random_checkpoint import preset, write_random_checkpoint
from blip3o_rt.config import EditConfig, ModelConfig

SEED = 0


def embedded_checkpoint() -> Path:
    """Folder of the embedded checkpoint, in the published layout.

    It is a seeded random model of the true structure, a few megabytes, written once into the user's cache:
    its pictures show that every stage runs, not what a prompt means. `BLIP3O_CACHE` names another cache
    folder.
    """
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "blip3o_rt"
    config = preset("tiny", EditConfig(use_und_image_vae=True, use_und_image_vae_as_noise=True))
    folder = Path(os.environ.get("BLIP3O_CACHE", default)) / folder_name(config)
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            made = Path(scratch) / "model"
            write_random_checkpoint(made, config, seed=SEED)
            with contextlib.suppress(OSError):  # another process was first: its copy is the same
                made.rename(folder)
    return folder


def folder_name(config: ModelConfig) -> str:
    """Name of a configuration's folder in the cache: another version or geometry never finds this one's."""
    geometry = json.dumps(asdict(config), sort_keys=True).encode()
    return f"random-{__version__}-{hashlib.sha256(geometry).hexdigest()[:12]}"
