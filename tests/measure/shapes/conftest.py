"""The trained model of the shapes that tests run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from blip3o_rt.embedded import embedded_checkpoint


@pytest.fixture(scope="session")
def shapes_checkpoint() -> Path:
    """The embedded checkpoint; BLIP3O_SHAPES_CHECKPOINT names another to be tested in its place."""
    return Path(os.environ.get("BLIP3O_SHAPES_CHECKPOINT") or embedded_checkpoint())
