"""Small checkpoints in the published layout, and ways to damage them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from blip3o_rt.config import EditConfig
from blip3o_rt.measure.random_checkpoint import preset, write_random_checkpoint

ALL_FLAGS = EditConfig(True, True, True)


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny published checkpoint with every editing part, its tower inside, in one file; never changed."""
    folder = tmp_path_factory.mktemp("written") / "source"
    write_random_checkpoint(folder, preset("tiny", ALL_FLAGS), seed=3)
    return folder


@pytest.fixture
def checkpoint(written: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    return shutil.copytree(written, tmp_path / "source")


def edit_json(path: Path, change: dict[str, Any] | None = None, remove: tuple[str, ...] = ()) -> None:
    """Change and remove keys of a JSON object in place."""
    data = json.loads(path.read_text())
    data.update(change or {})
    for key in remove:
        data.pop(key)
    path.write_text(json.dumps(data))


def edit_tensors(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrite a safetensors file after changing its dictionary of tensors."""
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
