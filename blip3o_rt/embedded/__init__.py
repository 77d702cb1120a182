"""The model that comes with the package, so that a fresh machine can draw without a download."""

from __future__ import annotations

from pathlib import Path


def embedded_checkpoint() -> Path:
    """Folder of the embedded checkpoint, in the published layout."""
    return Path(__file__).parent
