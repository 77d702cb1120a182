"""Recorded runs: the two reference recordings pass, and a recording that differs is caught where it does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import takewhile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from blip3o_rt.errors import CheckpointError
from blip3o_rt.measure.validate.golden import Recording, golden_lines
from blip3o_rt.measure.validate.images import Likeness
from blip3o_rt.measure.validate.line import Line

CPU = torch.device("cpu")


def no_images(*_: object) -> Likeness:
    raise AssertionError("the lines of the image come after those that are looked at here")


def before_the_image(folder: Path) -> Iterator[Line | str]:
    """All but the thirty steps, the decoder and the image, which the command's own test runs."""
    items = golden_lines(Recording(folder), CPU, no_images)
    last = "prediction, last step"
    yield from takewhile(lambda item: not (isinstance(item, Line) and item.name == last), items)


def changed(source: Path, folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """The recording with other tensors."""
    folder.mkdir()
    for name in ("checkpoint", "golden.png", "input.png"):
        if (source / name).exists():
            (folder / name).symlink_to(source / name)
    tensors = load_file(source / "golden.safetensors")
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "golden.safetensors")
    return folder


def test_prompts_are_read_from_the_recording(reference_dir: Path) -> None:
    assert Recording(reference_dir / "t2i").prompt == "a red circle on a blue background"
    assert Recording(reference_dir / "edit").prompt == "make the circle green"


def test_edit(reference_dir: Path) -> None:
    items = list(before_the_image(reference_dir / "edit"))
    assert items[0] == "golden: the recorded tokens were sampled, so they are replayed"
    lines = [item for item in items if isinstance(item, Line)]
    assert all(line.passed and line.group == "golden" for line in lines)
    assert [line.name for line in lines] == [
        "prompt ids",
        "hidden states, replayed",
        "reference latent",
        "image to pixels",
        "TA-Tok features",
        "TA-Tok codes",
        "timesteps",
        "prediction, first step",
    ]


def test_what_differs_is_named(reference_dir: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["first_noise_pred"] *= 1.0001
        tensors["prompt_ids"] = tensors["prompt_ids"].clone()
        tensors["und_tokens"][:3] += 1
        tensors["und_feats"] *= 1.0001

    items = before_the_image(changed(reference_dir / "edit", tmp_path / "edit", change))
    failed = {item.name: item.found for item in items if isinstance(item, Line) and not item.passed}
    assert set(failed) == {"TA-Tok codes", "TA-Tok features", "prediction, first step"}
    assert failed["TA-Tok codes"] == 3


def test_folders_that_are_no_recording(reference_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist: a recording has"):
        Recording(tmp_path)
    without = changed(reference_dir / "t2i", tmp_path / "t2i", lambda tensors: tensors.pop("noise"))
    with pytest.raises(CheckpointError, match=r"golden\.safetensors has no noise"):
        Recording(without)
    (without / "golden.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match=r"golden\.safetensors: "):
        Recording(without)
