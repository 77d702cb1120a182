"""The command on the embedded model: images, metadata, reproducibility, and Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

import blip3o_rt
from blip3o_rt.metadata import read_metadata
from tests.cli.conftest import Command
from tests.warm import run_python

COMMAND = [sys.executable, "-m", "blip3o_rt"]
MAIN = "import sys; from blip3o_rt.cli import main; sys.exit(main())"
TIMEOUT = 300  # seconds; far more than it takes, so that a busy machine does not fail the test


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """The package under test from any folder."""
    package = str(Path(blip3o_rt.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": package, "OMP_NUM_THREADS": "1"}


def test_generate_then_edit(tmp_path: Path, command: Command) -> None:
    options = ["--steps", "2", "--seed", "7", "--dtype", "fp32", "--device", "cpu"]
    assert command("generate", "a red circle", "-n", "2", *options, "--report", "r.json") == 0
    assert command.output.splitlines()[:2] == ["out/a-red-circle-7.png", "out/a-red-circle-8.png"]
    assert "tokens/s" in command.output
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["stages"]["denoise"]["work"] == 4
    assert report["dtype"] == "fp32"

    # image 1 of seed 7 is image 0 of seed 8, alone in its batch and in another process
    options[3] = "8"
    alone_there = run_python(
        MAIN, "generate", "a red circle", *options, "--out", "alone.png", "--quiet", folder=tmp_path
    )
    assert (alone_there.returncode, alone_there.stdout) == (0, "alone.png\n"), alone_there.stderr
    with (
        Image.open(tmp_path / "alone.png") as alone,
        Image.open(tmp_path / "out/a-red-circle-8.png") as second,
    ):
        assert alone.tobytes() == second.tobytes()
    fields = read_metadata(tmp_path / "alone.png")
    assert (fields["prompt"], fields["seed"], fields["parameters"]["steps"]) == ("a red circle", 8, 2)

    assert command("edit", "make it green", "alone.png", *options, "--out", "edit.png", "--quiet") == 0
    with Image.open(tmp_path / "edit.png") as edited, Image.open(tmp_path / "alone.png") as alone:
        assert edited.size == alone.size
        assert edited.tobytes() != alone.tobytes()


def test_interrupt_leaves_nothing_behind(tmp_path: Path, environment: dict[str, str]) -> None:
    # A background job inherits an ignored SIGINT, and Python leaves it so: set it as a terminal has it.
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "sys.stderr.isatty = lambda: True; "  # bars are drawn on a terminal only
        "from blip3o_rt.cli import main; sys.exit(main())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, "generate", "x", "--steps", "1000", "--out", "x.png"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    seen = ""
    while "denoise" not in seen:
        letter = process.stderr.read(1)
        assert letter, f"the command ended by itself: {seen}"
        seen += letter
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 130
    assert output == ""
    assert errors.splitlines()[-1].endswith("blip3o-rt: interrupted")
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def test_no_bars_where_standard_error_is_not_a_terminal(tmp_path: Path) -> None:
    found = run_python(MAIN, "generate", "x", "--steps", "1", folder=tmp_path)
    assert (found.returncode, found.stderr) == (0, "")  # nor lines of libraries in C


def test_an_image_is_drawn_again_from_its_file(tmp_path: Path, command: Command) -> None:
    assert command("generate", "a red circle", "--steps", "2", "--seed", "7", "--out", "a.png") == 0
    assert command("generate", "--like", "a.png", "--out", "b.png", "--quiet") == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    fields = read_metadata(tmp_path / "a.png")
    assert fields["checkpoint"]["name"] == "embedded"
    assert (fields["task"], fields["references"], fields["device"]) == ("text-to-image", [], "cpu")
    assert command("edit", "make it green", "a.png", "--steps", "2", "--out", "c.png") == 0
    assert command("edit", "--like", "c.png", "a.png", "--out", "d.png", "--quiet") == 0
    assert (tmp_path / "c.png").read_bytes() == (tmp_path / "d.png").read_bytes()
    assert len(read_metadata(tmp_path / "c.png")["references"]) == 1


def test_names_that_the_output_cannot_encode_are_escaped(tmp_path: Path) -> None:
    plain = "import sys; sys.stdout.reconfigure(encoding='ascii', errors='strict')\n"
    arguments = ["generate", "\u043a\u043e\u0442", "a cat", "--steps", "1", "--quiet"]
    found = run_python(plain + MAIN, *arguments, folder=tmp_path)
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines() == [r"out/\u043a\u043e\u0442-0.png", "out/a-cat-0.png"]


@pytest.mark.parametrize("module", ["torch", "numpy", "numpy.exceptions", "transformers"])
def test_an_interrupt_during_an_import_ends_the_command(
    tmp_path: Path, environment: dict[str, str], module: str
) -> None:
    """The signal comes as the module is looked for, from C code where an exception is lost or another.

    That of PyTorch imports numpy and goes on without it, and that of numpy imports numpy.exceptions.
    """
    program = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == '{module}': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "from blip3o_rt.cli import main; sys.exit(main())"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, "generate", "x", "--out", "x.png"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "blip3o-rt: interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_that_a_library_turns_into_another_error(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    """argparse's cleanup fails where its parsing is cut short."""
    program = (
        "import argparse, os, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "usage = argparse.ArgumentParser.format_usage\n"
        "def interrupt(self):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    return usage(self)\n"
        "argparse.ArgumentParser.format_usage = interrupt\n"
        "from blip3o_rt.cli import main; sys.exit(main())"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, "generate", "x"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "blip3o-rt: interrupted\n")


def test_a_second_interrupt_changes_nothing() -> None:
    """It comes as the line of the first is written."""
    program = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from blip3o_rt.cli import commands, main\n"
        "class Errors:\n"
        "    def write(self, text):\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        os.write(2, text.encode())\n"
        "sys.stderr, commands.parse = Errors(), lambda argv: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.exit(main())"
    )
    found = run_python(program, "generate", "x")
    assert (found.returncode, found.stdout, found.stderr) == (130, "", "blip3o-rt: interrupted\n")


@pytest.mark.exhaustive
def test_interrupts_at_any_time(tmp_path: Path, environment: dict[str, str]) -> None:
    """Before the package's first lines they are Python's, which ends by the signal or fails to import."""
    answered = 0
    for moment in range(60):
        process = subprocess.Popen(
            [*COMMAND, "generate", "x", "--steps", "1000", "--out", "x.png"],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        time.sleep(moment * 0.025)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=TIMEOUT)
        assert output == ""
        if process.returncode == 130:
            assert errors == "blip3o-rt: interrupted\n"
            answered += 1
        else:
            assert process.returncode in (-signal.SIGINT, 1)
            assert "in run_safely" not in errors
        assert list(tmp_path.iterdir()) == []
    assert answered


def test_nothing_heavy_is_imported_before_interrupts_are_answered(environment: dict[str, str]) -> None:
    program = "import sys; before = set(sys.modules); import blip3o_rt.cli; print(*set(sys.modules) - before)"
    printed = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert set(printed.split()) <= {"blip3o_rt", "blip3o_rt.cli", "__future__"}


@pytest.mark.parametrize("argument", ["doctor", "--help"])
def test_a_reader_that_has_gone_is_no_error(argument: str, environment: dict[str, str]) -> None:
    """Neither while the command prints, nor when Python flushes what is left as it ends."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as gone:
        found = subprocess.run(
            [*COMMAND, argument],
            env=environment,
            stdout=gone,
            stderr=subprocess.PIPE,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
    assert found.returncode in (0, 141)  # 0: argparse ignores what it cannot print
    assert found.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_an_output_that_is_full_is_named(environment: dict[str, str]) -> None:
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [*COMMAND, "--version"],
            env=environment,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
    assert result.returncode == 2
    assert result.stderr == "blip3o-rt: error: standard output: No space left on device\n"


def test_openmp_prints_no_lines_of_its_own(environment: dict[str, str]) -> None:
    code = "from blip3o_rt.cli import main; main(['generate', 'x', '--device', 'tpu'])"
    wrong = {**environment, "OMP_NUM_THREADS": "abc"}
    found = subprocess.run(
        [sys.executable, "-c", code], env=wrong, capture_output=True, text=True, timeout=TIMEOUT
    )
    warning, error = found.stderr.splitlines()
    assert warning.startswith("blip3o-rt: warning: OMP_NUM_THREADS is 'abc', which OpenMP does not take")
    assert error.startswith("blip3o-rt: error: device is 'tpu'")


def test_what_the_model_refuses_is_one_line(command: Command) -> None:
    assert command.refused("generate", " ", "--quiet").startswith("the prompt is empty")
