"""blip3o-rt validate from end to end: lines, record, page, exit codes, refusals and interruption."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from blip3o_rt import ops
from blip3o_rt.checkpoint.convert import convert
from blip3o_rt.checkpoint.source import SANA_NAME
from blip3o_rt.measure.provenance import record_head
from blip3o_rt.measure.random_checkpoint import preset, write_random_checkpoint
from blip3o_rt.measure.validate import run as validate_run
from blip3o_rt.measure.validate.checkpoint import EDITING
from tests.cli.conftest import Command

LINE = {
    "group": str,
    "name": str,
    "implementation": str | None,
    "dtype": str,
    "shape": str | None,
    "measure": str,
    "found": float | None,
    "reference_error": float | None,
    "bound": float,
    "why": str,
    "passed": bool,
    "detail": str | None,
}
RIGHT = """
import torch
from blip3o_rt import ops

@ops.silu_mul.implementation("mine", device="cpu")
def silu_mul(gate_up, *, out=None):
    gate, up = gate_up.float().chunk(2, dim=-1)
    result = (gate / (1 + torch.exp(-gate)) * up).to(gate_up.dtype)
    return result if out is None else out.copy_(result)
"""
WRONG = RIGHT.replace("gate, up =", "up, gate =")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("validate") / "tiny"
    write_random_checkpoint(folder, preset("tiny", EDITING), seed=0)
    return folder


def record(folder: Path = Path("out/validate")) -> dict[str, Any]:
    return json.loads((folder / "validate.json").read_text())


def check_record(found: dict[str, Any]) -> None:
    """The head that every record has, and lines of exactly these fields and types."""
    head = record_head("validate", [])
    assert set(found) == {*head, "model", "lines", "images", "notes"}
    assert found["kind"] == "validate"
    for line in found["lines"]:
        assert set(line) == set(LINE)
        for name, kind in LINE.items():
            assert isinstance(line[name], kind), (name, line)
    for image in found["images"]:
        assert set(image) == {"name", "ours", "reference", "difference", "psnr", "ssim", "amplified"}


def test_stages_of_a_tiny_model(command: Command) -> None:
    """A random checkpoint is written, compared and kept for the next run."""
    options = ("--only", "ar,dit,vae,tatok,pipeline,determinism", "--work", "kept", "--steps", "2")
    assert command("validate", "--model", "tiny", *options) == 0
    found = record()
    check_record(found)
    assert found["complete"] is True
    assert found["model"]["size"] == "tiny"
    assert {line["group"] for line in found["lines"]} == set(options[1].split(","))
    assert all(line["passed"] for line in found["lines"])
    yardsticks = [line for line in found["lines"] if line["dtype"] == "bf16" and "L2" in line["measure"]]
    assert yardsticks
    assert all(line["reference_error"] > 0 for line in yardsticks)
    names = [image["name"] for image in found["images"]]
    assert names == [
        *(f"vae decode {dtype}" for dtype in ("fp32", "bf16")),
        *(f"pipeline {mode} {dtype}" for dtype in ("fp32", "bf16") for mode in ("text", "edit")),
    ]
    files = command.files()
    assert all(
        f"out/validate/{image[kind]}" in files
        for image in found["images"]
        for kind in ("ours", "reference", "difference")
    )
    assert "out/validate/validate.html" in files
    assert f"{len(found['lines'])} lines, all passed" in command.output
    assert "writing a random checkpoint" in command.output
    assert "note: stages: 64 of 64 tokens" in command.output
    kept = [file for file in files if file.startswith("kept/")]
    assert command("validate", "--model", "tiny", "--only", "tatok", "--work", "kept") == 0
    assert "writing" not in command.output
    assert [file for file in command.files() if file.startswith("kept/")] == kept


def test_one_op(command: Command) -> None:
    assert command("validate", "--op", "silu_mul", "--op", "gated_add", "--dtype", "bf16") == 0
    found = record()
    check_record(found)
    assert {(line["group"], line["name"], line["dtype"]) for line in found["lines"]} == {
        ("ops", "silu_mul", "bf16"),
        ("ops", "gated_add", "bf16"),
    }
    assert found["images"] == []


@pytest.mark.exhaustive
def test_all_ops_by_default_of_the_group(command: Command) -> None:
    assert command("validate", "--only", "ops", "--dtype", "fp32", "--out", "elsewhere") == 0
    assert {line["name"] for line in record(Path("elsewhere"))["lines"]} == set(ops.all_ops())


def test_a_kernel_of_ones_own(command: Command) -> None:
    Path("mine.py").write_text(RIGHT)
    assert command("validate", "--kernel", "mine.py") == 0
    lines = record()["lines"]
    assert [(line["name"], line["implementation"], line["dtype"]) for line in lines] == [
        ("silu_mul", "mine", "fp32"),
        ("silu_mul", "mine", "bf16"),
    ]
    assert record()["model"]["kernels"] == ["silu_mul=mine"]
    assert "mine" not in ops.silu_mul.implementation_names


def test_a_wrong_kernel_is_named_and_exits_with_1(command: Command) -> None:
    Path("mine.py").write_text(WRONG)
    assert command("validate", "--kernel", "mine.py") == 1
    summary = command.output[command.output.index("\nfailed:") :]
    assert "FAIL ops         silu_mul" in summary
    assert "mine" in summary
    assert "FAILED" in summary.splitlines()[-3]
    found = record()
    check_record(found)
    assert found["complete"] is True
    assert not any(line["passed"] for line in found["lines"])


def test_nothing_compared_is_no_success(command: Command) -> None:
    """A kernel that takes no call, and an op that has no case in the dtype."""
    Path("mine.py").write_text(RIGHT.replace('device="cpu"', 'device="cpu", supports=lambda *_, **__: "no"'))
    assert command("validate", "--kernel", "mine.py") == 1
    assert "note: ops: silu_mul on 'mine' took none of" in command.output
    assert command("validate", "--op", "guided_euler_step", "--dtype", "bf16") == 1
    assert "0 lines, NOTHING was compared" in command.output


def test_a_checkpoint_that_names_repositories(command: Command, tiny: Path) -> None:
    """As published ones do: no sana/ and no siglip2/ beside the weights; both are given by options."""
    shutil.copytree(tiny, "published")
    shutil.move("published/sana", "diffusers")
    shutil.move("published/siglip2", "siglip2")
    ta_tok = Path("ta_tok.pth")
    config = json.loads(Path("published/config.json").read_text())
    config["diffusion_name_or_path"] = SANA_NAME
    Path("published/config.json").write_text(json.dumps(config))
    write_random_checkpoint(Path("other"), preset("tiny", EDITING), seed=1, tower="file")
    shutil.move("other/ta_tok.pth", ta_tok)
    options = ("--only", "dit,vae,tatok,pipeline", "--dtype", "fp32", "--steps", "2")
    given = ("--diffusion", "diffusers", "--ta-tok", ta_tok)
    assert command("validate", "--checkpoint", "./published", *given, *options) == 0
    assert "--checkpoint is deprecated: its name is --model" in command.errors
    assert {line["group"] for line in record()["lines"]} == set(options[1].split(","))
    assert command("validate", "--size", "tiny", *given, *options) == 2
    assert "--size is deprecated: its name is --model" in command.errors
    assert "--diffusion and --ta-tok are of a published checkpoint" in command.errors


def test_a_kernel_in_the_stages(command: Command, tiny: Path) -> None:
    Path("mine.py").write_text(WRONG)
    options = ("--model", tiny, "--only", "ar,tatok", "--dtype", "fp32", "--tokens", "8")
    assert command("validate", "--kernel", "mine.py", *options) == 1
    found = record()
    failed = {(line["group"], line["name"]) for line in found["lines"] if not line["passed"]}
    assert ("ar", "hidden states, token by token") in failed
    assert {group for group, _ in failed} == {"ar"}
    assert "ar: silu_mul ran on mine" in found["notes"]
    assert "tatok: silu_mul ran on nothing" in found["notes"]


def test_an_error_in_a_group_is_a_line_that_failed(
    command: Command, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> Iterator[object]:
        raise RuntimeError("it broke\nin two lines")
        yield

    monkeypatch.setattr("blip3o_rt.measure.validate.ar.ar_lines", broken)
    assert command("validate", "--model", tiny, "--only", "ar,tatok", "--dtype", "fp32") == 1
    found = record()
    check_record(found)
    first, *others = found["lines"]
    assert (first["group"], first["name"], first["passed"]) == ("ar", "ended by an error", False)
    assert first["detail"] == "RuntimeError: it broke"
    assert others
    assert all(line["passed"] for line in others)


def test_interrupted_between_two_lines(command: Command, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What there was is kept: record, page and summary; the record says that it is not all."""
    from blip3o_rt.measure.validate.vae import vae_lines

    def interrupted(*arguments: Any) -> Iterator[object]:
        yield next(vae_lines(*arguments))
        raise KeyboardInterrupt

    monkeypatch.setattr("blip3o_rt.measure.validate.vae.vae_lines", interrupted)
    options = ("--only", "vae,tatok", "--dtype", "fp32")
    assert command("validate", "--model", tiny, *options) == 130
    assert command.errors == "blip3o-rt: interrupted\n"
    assert "1 lines, all passed" in command.output
    found = record()
    check_record(found)
    assert found["complete"] is False
    assert [line["name"] for line in found["lines"]] == ["image to pixels"]
    assert Path("out/validate/validate.html").is_file()


@pytest.mark.exhaustive
def test_golden(command: Command, reference_dir: Path) -> None:
    """Thirty steps and the decoder at 1024 x 1024 of a small checkpoint: the longest test of this file."""
    folder = reference_dir / "t2i"
    assert command("validate", "--against", folder, "--only", "golden") == 0
    found = record()
    check_record(found)
    names = {line["name"] for line in found["lines"]}
    assert {"greedy tokens", "hidden states, token by token", "latent after 30 steps"} <= names
    assert {"image: gray levels", "image: PSNR", "image: SSIM"} <= names
    assert [image["name"] for image in found["images"]] == ["golden t2i"]
    assert found["model"]["size"] == str(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--only", "ops,everything"), "--only is everything: accepted are ops,ar,dit,vae,tatok,"),
        (("--only", ","), "--only is empty"),
        (("--dtype", "fp16"), "--dtype is fp16: accepted are fp32,bf16"),
        (("--op", "rmsnorm"), "there is no op 'rmsnorm' to validate; the ops are: "),
        (("--only", "golden"), "--only golden needs --against DIR"),
        (("--steps", "0"), "--steps is 0: accepted is a whole number from 1"),
        (("--model", "nowhere"), "--model is 'nowhere': accepted are"),
        (("--against", "nowhere"), "nowhere/checkpoint does not exist: a recording has"),
        (("--kernel", "nowhere.py"), "nowhere.py: there is no such file"),
        (("--model", "huge"), "--model is 'huge': accepted are published, tiny, shapes or"),
        (("--model", "tiny", "--against", "x"), "not allowed with argument"),
    ],
)
def test_refusals(options: tuple[str, ...], message: str, command: Command) -> None:
    assert message in command.refused("validate", *options)
    assert command.files() == []


def test_a_converted_checkpoint_is_refused(command: Command, tiny: Path) -> None:
    convert(tiny, Path("converted"), progress=False)
    message = command.refused("validate", "--model", "converted", "--only", "ar")
    assert "the published code cannot read it" in message
    assert str(tiny) in message


def test_without_the_published_packages(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages are refused with the remedy; ops are compared all the same."""
    real = importlib.util.find_spec
    monkeypatch.setattr(
        validate_run.importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "diffusers" else real(name, *rest),
    )
    message = command.refused("validate", "--model", "tiny")
    assert "needs diffusers: pip install 'blip3o_rt[bench]'" in message
    assert command("validate", "--op", "silu_mul") == 0


def test_ops_and_runtime_load_nothing_of_the_published_packages() -> None:
    code = (
        "import sys, blip3o_rt.pipeline, blip3o_rt.cli.validate, blip3o_rt.measure.validate.run\n"
        "print([name for name in ('diffusers', 'skimage', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys\nfrom blip3o_rt.cli import main\n"
        "try:\n    main(['validate', '--help'])\nexcept SystemExit:\n    print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
