"""The build: what it decides, what it says, what a source distribution carries. Nothing is compiled here."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "blip3o_rt"
DATA = (".json", ".safetensors", ".html", ".css", ".js", ".svg", ".png")

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


@pytest.fixture
def library(tmp_path: Path, tools: Path) -> Path:
    """The folder that an installation copies into site-packages, without extension modules."""
    info, library = tmp_path / "egg", tmp_path / "lib"
    info.mkdir()
    done = setup(tmp_path, tools, "egg_info", f"--egg-base={info}", "build_py", f"--build-lib={library}")
    assert done.returncode == 0, done.stderr
    return library


def python(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Runs code that finds packages in a folder, and nothing of an editable installation."""
    alone = "import sys; sys.meta_path = [f for f in sys.meta_path if 'Editable' not in str(f)]\n"
    return subprocess.run(
        [sys.executable, "-c", alone + code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )


def test_triton_kernels_of_another_project_are_left_alone(library: Path) -> None:
    theirs = library / "triton_kernels"
    assert not theirs.exists()
    theirs.mkdir()
    (theirs / "__init__.py").write_text("OWNER = 'theirs'\n")
    done = python(
        library,
        "import triton_kernels, blip3o_rt.triton_kernels as ours\n"
        "print(triton_kernels.OWNER, ours.__file__, ours.__doc__)",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"theirs {library}/blip3o_rt/triton_kernels/__init__.py Triton kernels")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("installed", [True, pytest.param(False, marks=pytest.mark.exhaustive)])
def test_triton_kernels_are_found(tmp_path: Path, library: Path, installed: bool) -> None:
    if not installed:  # the tree as it is checked out, with the folder at the top
        (library / "blip3o_rt" / "triton_kernels").rename(library / "triton_kernels")
    code = "from blip3o_rt.ops import triton_backend as t\nt.kernel('cross_attention')\nprint(t.__file__)"
    done = python(library, code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(library))


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
    folders = (ROOT / "csrc", ROOT / "triton_kernels", PACKAGE / "embedded")
    found = {
        str(path.relative_to(ROOT)) for folder in folders for path in folder.rglob("*") if path.is_file()
    }
    sources = {name for name in found if "__pycache__" not in name}
    assert {"setup.py", "CMakeLists.txt", "pyproject.toml", "blip3o_rt/ops/registry.py"} | sources <= names


def test_an_installed_package_carries_every_data_file(library: Path) -> None:
    files = [path for path in PACKAGE.rglob("*") if path.suffix in DATA]
    assert {"model.safetensors", "validate.html"} <= {path.name for path in files}
    for path in files:
        assert (library / path.relative_to(ROOT)).read_bytes() == path.read_bytes()
