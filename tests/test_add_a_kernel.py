"""docs/add-a-kernel.md does what it says: its operation is added to a copy of the tree, built and checked."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "add-a-kernel.md"
COPIED = ("blip3o_rt", "csrc", "tests", "triton_kernels", "CMakeLists.txt", "pyproject.toml", "setup.py")
MOST_FILES = 5
BLOCK = re.compile(
    r"^```\w+\n(?:#|//) (add to|change in|new file) (\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL
)
COMMANDS = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)

pytestmark = pytest.mark.exhaustive


def copy_of_the_tree(folder: Path) -> None:
    unwanted = shutil.ignore_patterns("__pycache__", "*.so", "*.partial")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=unwanted)
        else:
            shutil.copy(ROOT / name, folder / name)


def follow(how: str, path: Path, text: str) -> None:
    """Apply a block of the document."""
    if how == "new file":
        assert not path.exists()
        path.write_text(text)
    elif how == "add to":
        path.write_text(f"{path.read_text()}\n\n{text}")
    else:
        lines = [(line[0], line[1:]) for line in text.splitlines()]
        old = "\n".join(line for sign, line in lines if sign != "+")
        assert path.read_text().count(old) == 1, f"{path} has no single place for\n{text}"
        new = "\n".join(line for sign, line in lines if sign != "-")
        path.write_text(path.read_text().replace(old, new))


def run(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a line of the document in a tree."""
    words = shlex.split(line, comments=True)
    given = dict(word.split("=") for word in words if re.match(r"[A-Z_]+=", word))
    program, *arguments = words[len(given) :]
    command = {
        "make": ["setup.py", "-q", "build_ext", "--inplace"],
        "python": arguments,
        "blip3o-rt": ["-m", "blip3o_rt", *arguments],
    }[program]
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=os.environ | given, capture_output=True, text=True
    )


@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_the_document_word_for_word(tmp_path: Path) -> None:
    copy_of_the_tree(tmp_path)
    document, triton = DOCUMENT.read_text(encoding="utf-8").split("## A Triton kernel")
    blocks = BLOCK.findall(document)
    assert len({path for _, path, _ in blocks}) <= MOST_FILES
    for how, path, text in blocks:
        follow(how, tmp_path / path, text)
    (commands,) = COMMANDS.findall(document)
    for line in commands.splitlines():
        done = run(line, tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        assert line == "make build" or "squared_relu" in done.stdout or "passed" in done.stdout, done.stdout
    if importlib.util.find_spec("triton") is None:
        return
    for how, path, text in BLOCK.findall(triton):
        follow(how, tmp_path / path, text)
    (tmp_path / "blip3o_rt" / "triton_kernels").symlink_to(tmp_path / "triton_kernels")  # as installed
    interpret, resources = COMMANDS.findall(triton)[0].splitlines()
    done = run(interpret, tmp_path)
    errors = [json.loads(line)["errors"] for line in done.stdout.splitlines()]
    assert (len(errors) > 5, any(errors)) == (True, False), done.stdout + done.stderr
    assert run(resources, tmp_path).returncode == 0
    table = json.loads((tmp_path / "tests/triton_kernels/resources.json").read_text())["kernels"]
    assert "bf16 dit: squared_relu_squared_relu" in table
