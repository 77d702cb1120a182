"""The convert command: what it prints, and its exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from blip3o_rt.checkpoint.load import load_checkpoint
from blip3o_rt.cli import main
from blip3o_rt.measure.random_checkpoint import write_random_checkpoint


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_random_checkpoint(tmp_path / "source", tower="file")
    return tmp_path / "source"


def test_it_converts_and_says_what_it_took(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "converted"
    assert main(["convert", str(source), str(target), "--dtype", "fp32"]) == 0
    output = capsys.readouterr()
    assert "in fp32" in output.out
    assert "peak memory" in output.out
    assert "convert: 100%" in output.err
    assert load_checkpoint(target, verify=True).config.ta_tok is not None


def test_it_takes_folders_of_ones_own(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (source / "sana").rename(tmp_path / "diffusers")
    (source / "ta_tok.pth").rename(tmp_path / "tower.pth")
    plain = ["convert", str(source), str(tmp_path / "converted"), "--quiet"]
    assert main(plain) == 2
    assert "--diffusion" in capsys.readouterr().err
    given = ["--diffusion", str(tmp_path / "diffusers"), "--ta-tok", str(tmp_path / "tower.pth")]
    assert main([*plain, *given]) == 0
    assert capsys.readouterr().err == ""


def test_warnings_are_lines_of_ours_and_none_under_quiet(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = {**load_file(source / "model.safetensors"), "model.mystery.weight": torch.zeros(2)}
    save_file(tensors, source / "model.safetensors")
    for number, quiet in enumerate(([], ["--quiet"])):
        assert main(["convert", str(source), str(tmp_path / f"converted{number}"), *quiet]) == 0
        lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("convert: ")]
        expected = "blip3o-rt: warning: model.mystery.weight is not known and was left out"
        assert [line for line in lines if line] == ([] if quiet else [expected])


def test_it_verifies(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "converted"
    assert main(["convert", str(source), str(target), "--quiet"]) == 0
    assert main(["convert", "--verify", str(target)]) == 0
    assert "files are as they were written (bf16)" in capsys.readouterr().out
    with (target / "ar.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x07")
    assert main(["convert", "--verify", str(target)]) == 2
    assert "checksum mismatch" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "two folders are needed"),
        (["here"], "two folders are needed"),
        (["nowhere", "there"], "nowhere: not a folder"),
        (["a", "--verify", "b"], "takes one folder"),
        (["--verify", "nowhere"], "not found"),
    ],
)
def test_bad_arguments_end_with_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("blip3o-rt: error: ")
    assert error.count("\n") == 1


def test_an_existing_destination_needs_force(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["convert", str(source), str(tmp_path / "converted"), "--quiet"]
    assert main(arguments) == 0
    assert main(arguments) == 2
    assert "--force" in capsys.readouterr().err
    assert main([*arguments, "--force"]) == 0
