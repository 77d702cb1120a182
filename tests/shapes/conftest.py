"""The trained model of the shapes that tests run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import blip3o_rt


@pytest.fixture(scope="session")
def shapes_checkpoint() -> Path:
    """The embedded checkpoint; BLIP3O_SHAPES_CHECKPOINT names another to be tested in its place."""
    embedded = Path(blip3o_rt.__file__).parent / "shapes" / "checkpoint"
    folder = Path(os.environ.get("BLIP3O_SHAPES_CHECKPOINT", embedded))
    if not folder.is_dir():
        pytest.skip(f"needs a trained model of the shapes: {folder} does not exist")
    return folder
