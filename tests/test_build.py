"""The build: what it decides, what it says, what a source distribution carries. Nothing is compiled here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHECKPOINT = ROOT / "blip3o_rt" / "shapes" / "checkpoint"

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A folder for the PATH, with nothing in it but what a test puts there."""
    folder = tmp_path / "tools"
    folder.mkdir()
    return folder


def program(path: Path, script: str = "exit 1") -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def setup(
    tmp_path: Path, tools: Path, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs setup.py with only `tools` on the PATH, so that it finds just the compilers a test wants."""
    clean = {k: v for k, v in os.environ.items() if k not in ("CXX", "CUDACXX", "CUDA_HOME", "CUDA_PATH")}
    return subprocess.run(
        [sys.executable, "setup.py", "-q", *arguments],
        cwd=ROOT,
        env={**clean, "PATH": str(tools), **environment},
        capture_output=True,
        text=True,
    )


def build(tmp_path: Path, tools: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    folders = [f"--build-lib={tmp_path / 'lib'}", f"--build-temp={tmp_path / 'temp'}"]
    return setup(tmp_path, tools, "build_ext", *folders, **environment)


def lines_about_us(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("blip3o_rt:")]


def test_without_a_compiler_it_installs_and_says_so(tmp_path: Path, tools: Path) -> None:
    done = build(tmp_path, tools)
    assert done.returncode == 0, done.stderr
    assert lines_about_us(done) == [
        "blip3o_rt: WARNING: no C++ compiler was found: nothing is built, ops run on torch (slower)"
    ]


def test_cuda_on_without_nvcc(tmp_path: Path, tools: Path) -> None:
    program(tools / "c++")
    done = build(tmp_path, tools, BLIP3O_CUDA="on", CUDA_HOME=str(tools))
    assert done.returncode != 0
    assert "BLIP3O_CUDA=on, but nvcc was not found; install the CUDA toolkit or set CUDA_HOME" in done.stderr


def test_unknown_choice(tmp_path: Path, tools: Path) -> None:
    program(tools / "c++")
    done = build(tmp_path, tools, BLIP3O_CUDA="maybe")
    assert done.returncode != 0
    assert "BLIP3O_CUDA is 'maybe'; accepted: auto, on, off" in done.stderr


# A cmake that "builds" _cpu, and _cuda only if told to.
CMAKE = """
case "$*" in
  *"--target _cuda"*) {cuda} ;;
  *--target*) for last; do :; done ;;
esac
case "$1" in --build) mkdir -p "$2"; for s in {suffixes}; do : > "$2/_cpu$s"; : > "$2/_cuda$s"; done ;; esac
exit 0
"""


def fake_cmake(tools: Path, cuda: str) -> None:
    from importlib.machinery import EXTENSION_SUFFIXES

    program(tools / "c++")
    program(tools / "cmake", CMAKE.format(cuda=cuda, suffixes=" ".join(EXTENSION_SUFFIXES)))
    for name in ("mkdir", "sh"):
        (tools / name).symlink_to(str(shutil.which(name)))


def built(tmp_path: Path) -> set[str]:
    return {path.name.partition(".")[0] for path in (tmp_path / "lib").rglob("*.so")}


def test_cuda_off(tmp_path: Path, tools: Path) -> None:
    fake_cmake(tools, "exit 1")
    done = build(tmp_path, tools, BLIP3O_CUDA="off")
    assert done.returncode == 0, done.stderr
    assert lines_about_us(done) == ["blip3o_rt: _cuda is not built: BLIP3O_CUDA=off"]
    assert built(tmp_path) == {"_cpu"}


@pytest.mark.parametrize("choice", ["auto", "on"])
def test_cuda_that_compiles(tmp_path: Path, tools: Path, choice: str) -> None:
    fake_cmake(tools, ":")
    program(tools / "nvcc")
    done = build(tmp_path, tools, BLIP3O_CUDA=choice)
    assert done.returncode == 0, done.stderr
    assert lines_about_us(done) == [f"blip3o_rt: _cuda is built with {tools / 'nvcc'} (BLIP3O_CUDA={choice})"]
    assert built(tmp_path) == {"_cpu", "_cuda"}


def test_cuda_that_fails_to_compile_is_left_out(tmp_path: Path, tools: Path) -> None:
    fake_cmake(tools, "exit 1")
    program(tools / "nvcc")
    done = build(tmp_path, tools, BLIP3O_CUDA="auto")
    assert done.returncode == 0, done.stderr
    assert "blip3o_rt: WARNING: _cuda did not compile and is left out" in done.stderr
    assert built(tmp_path) == {"_cpu"}


def test_cuda_that_fails_to_compile_stops_a_build_that_wants_it(tmp_path: Path, tools: Path) -> None:
    fake_cmake(tools, "exit 1")
    program(tools / "nvcc")
    assert build(tmp_path, tools, BLIP3O_CUDA="on").returncode != 0


def test_source_distribution_can_be_built_from(tmp_path: Path, tools: Path) -> None:
    egg_info = tmp_path / "egg"
    egg_info.mkdir()
    done = setup(
        tmp_path,
        tools,
        "egg_info",
        f"--egg-base={egg_info}",
        "sdist",
        "--formats=gztar",
        f"--dist-dir={tmp_path}",
    )
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    folders = (ROOT / "csrc", CHECKPOINT)
    sources = {str(p.relative_to(ROOT)) for folder in folders for p in folder.rglob("*") if p.is_file()}
    assert {"setup.py", "CMakeLists.txt", "pyproject.toml", "blip3o_rt/ops/registry.py"} | sources <= names


def test_an_installed_package_carries_the_embedded_model(tmp_path: Path, tools: Path) -> None:
    info = tmp_path / "egg"
    info.mkdir()
    done = setup(
        tmp_path, tools, "egg_info", f"--egg-base={info}", "build_py", f"--build-lib={tmp_path / 'lib'}"
    )
    assert done.returncode == 0, done.stderr
    installed = tmp_path / "lib" / CHECKPOINT.relative_to(ROOT)
    for path in CHECKPOINT.rglob("*"):
        if path.is_file():
            assert (installed / path.relative_to(CHECKPOINT)).read_bytes() == path.read_bytes()
