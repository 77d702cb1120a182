"""The embedded model is written once per geometry and version, and found again."""

from __future__ import annotations

from pathlib import Path

import pytest

from blip3o_rt import __version__, embedded
from blip3o_rt.checkpoint.random_checkpoint import preset
from blip3o_rt.config import EditConfig


def test_another_geometry_or_version_is_another_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, edits = preset("tiny", EditConfig()), preset("tiny", EditConfig(use_und_image_vae=True))
    name = embedded.folder_name(plain)
    assert name.startswith(f"random-{__version__}-")
    assert name == embedded.folder_name(preset("tiny", EditConfig()))
    assert name != embedded.folder_name(edits)
    monkeypatch.setattr(embedded, "__version__", "99.0")
    assert name != embedded.folder_name(plain)


def test_it_is_written_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BLIP3O_CACHE", str(tmp_path / "cache"))
    folder = embedded.embedded_checkpoint()
    assert (folder / "config.json").is_file()
    assert list((tmp_path / "cache").iterdir()) == [folder]
    monkeypatch.setattr(embedded, "write_random_checkpoint", None)
    assert embedded.embedded_checkpoint() == folder
