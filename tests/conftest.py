"""Fixtures shared by the whole suite."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def reference_dir() -> Path:
    """Folder of the reference checkpoints and of what the published code computed on them.

    BLIP3O_REFERENCE names it; otherwise it is looked for beside the repository.
    """
    beside = Path(__file__).resolve().parents[2] / "shared" / "reference"
    folder = Path(os.environ.get("BLIP3O_REFERENCE", beside))
    if not folder.is_dir():
        pytest.skip(f"needs the reference checkpoints: {folder} does not exist (set BLIP3O_REFERENCE)")
    return folder
