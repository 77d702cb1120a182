"""What a user may name as a checkpoint, and as a place for one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from blip3o_rt.checkpoint.convert import convert
from blip3o_rt.checkpoint.load import load_checkpoint
from blip3o_rt.checkpoint.source import Source
from blip3o_rt.errors import CheckpointError


def norm(path: object) -> torch.Tensor:
    return load_checkpoint(path).weights["ar"]["norm.weight"]  # type: ignore[arg-type]


def test_a_hub_cache_is_opened_at_its_newest_snapshot(checkpoint: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--BLIP3o--BLIP3o-NEXT"
    for index, name in enumerate(("newer", "older")):
        shutil.copytree(checkpoint, cache / "snapshots" / name)
        (cache / "snapshots" / "older" / "config.json").unlink(missing_ok=True)
        os.utime(cache / "snapshots" / name, (2000 - index, 2000 - index))
    (cache / "snapshots" / ".DS_Store").touch()  # no snapshot, and newer
    assert torch.equal(norm(cache), norm(checkpoint))
    shutil.rmtree(cache / "snapshots")
    (cache / "snapshots").mkdir()
    with pytest.raises(CheckpointError, match="without snapshots"):
        norm(cache)


def test_a_hub_name_says_how_to_download_it() -> None:
    with pytest.raises(CheckpointError, match="hf download BLIP3o/BLIP3o-NEXT --local-dir DIR"):
        load_checkpoint("BLIP3o/BLIP3o-NEXT")


def test_home_is_expanded(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (checkpoint / "sana").rename(tmp_path / "diffusers")
    source = Source("~/source", diffusion="~/diffusers")
    convert(source, "~/converted", progress=False)
    assert torch.equal(norm("~/converted"), norm(source))
    load_checkpoint(source, cache_dir="~/cache")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "diffusers", "converted", "cache"}


@pytest.mark.parametrize("name", ["a" * 5000, "nul\0", "~nobody-of-this-name/x", 5, b"bytes"])
def test_a_name_that_no_folder_has_is_refused_in_one_line(name: object) -> None:
    with pytest.raises(CheckpointError) as found:
        load_checkpoint(name)  # type: ignore[arg-type]
    assert "\n" not in str(found.value)


def test_a_cache_that_is_a_file_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for cache in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("a" * 300)):
        with pytest.raises(CheckpointError, match="not written") as found:
            load_checkpoint(checkpoint, cache_dir=cache)
        assert "\n" not in str(found.value)


def test_links_in_a_circle_are_no_destination(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for destination in (tmp_path / "loop", tmp_path / "loop" / "below"):
        with pytest.raises(CheckpointError, match="loop"):
            convert(checkpoint, destination, progress=False)
        with pytest.raises(CheckpointError, match="loop"):
            load_checkpoint(checkpoint, cache_dir=destination)


@pytest.mark.parametrize("name", [".", "..", "../here", "link to here"])
def test_the_current_folder_is_no_destination(
    name: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    if name.startswith("link"):
        (tmp_path / name).symlink_to(tmp_path / "here")
        name = f"../{name}"
    with pytest.raises(CheckpointError, match="the current folder or one above it"):
        convert(checkpoint, name, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir() if not path.is_symlink()) == ["here", "source"]


def test_a_mount_point_is_no_destination(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mounted").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "mounted")
    with pytest.raises(CheckpointError, match="a mount point, which cannot be replaced"):
        convert(checkpoint, tmp_path / "mounted", progress=False)
    assert list((tmp_path / "mounted").iterdir()) == []


def test_a_link_to_an_empty_folder_is_written_to(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    convert(checkpoint, tmp_path / "link", progress=False)
    assert (tmp_path / "link").is_symlink()
    assert torch.equal(norm(tmp_path / "empty"), norm(checkpoint))
