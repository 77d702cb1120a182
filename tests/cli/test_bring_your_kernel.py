"""docs/bring-your-kernel.md does what it says: its files are written, its commands run, its output theirs."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

from tests.cli.conftest import Command

DOCUMENT = Path(__file__).parents[2] / "docs" / "bring-your-kernel.md"
FAILS = "  # exits with 1"
FEW_SAMPLES = ["--quick", "--baselines", "none"]  # the document says nothing of samples


def blocks() -> list[tuple[str, list[str]]]:
    """Language and lines of every fenced block."""
    found = re.findall(r"^```(\w+)\n(.*?)^```$", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    return [(language, text.splitlines()) for language, text in found]


def execute(line: str, command: Command) -> None:
    """Run a command line of the document and check the exit code that it states."""
    program, *arguments = shlex.split(line, comments=True)
    if program == "python":
        runpy.run_path(arguments[0], run_name="__main__")
        return
    assert program == "blip3o-rt"
    if arguments[0] == "bench" and arguments[1] != "compare":
        arguments += FEW_SAMPLES
    assert command(*arguments) == (1 if line.endswith(FAILS) else 0), command.output + command.errors


def words(line: str) -> str:
    """A line without its figures, which are a machine's own, and its spacing."""
    return " ".join(re.sub(r"\b\d+(\.\d+)?(e[+-]\d+)?\b", "#", line).split())


def test_the_document_word_for_word(command: Command) -> None:
    """Output that the document shows is of the command above it."""
    ran = []
    for language, lines in blocks():
        if language == "python":
            name = lines[0].removeprefix("# ")
            assert name.endswith(".py")
            Path(name).write_text("\n".join(lines) + "\n")
        elif language == "sh":
            for line in lines:
                execute(line, command)
                ran.append(shlex.split(line)[:2])
        else:
            shown = [words(line) for line in command.output.splitlines()]
            for line in lines:
                assert any(words(line) in found for found in shown), (line, command.output)
    assert ["blip3o-rt", "validate"] in ran
    assert ["blip3o-rt", "bench"] in ran
    assert ["python", "draw.py"] in ran
