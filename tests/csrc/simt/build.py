"""Compiles .cu files for the CPU, against the headers in include/, and opens them from Python."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pybind11
import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[2] / "csrc"
KEPT = HERE.parents[2] / "build" / "simt"  # what was compiled, by all that it depends on

SEVERAL = {
    "rms_norm": ("rms_norm", "rms_norm_keep"),
    "row_linear": ("row_linear", "row_linear_w8", "norm_row_linear", "row_linear_add"),
}
"""Ops of one .cu file and one function in it, by the name of the file."""


def ops_of(file: str) -> tuple[str, ...]:
    """The ops that a .cu file is of."""
    return SEVERAL.get(file, (file,))


def file_of(op: str) -> str:
    """The name of an op's .cu file."""
    return next((file for file, ops in SEVERAL.items() if op in ops), op)


def source_of(op: str) -> str:
    """The text of an op's .cu file."""
    return (CSRC / "cuda" / f"{file_of(op)}.cu").read_text()


class SimtCompiler:
    """Builds libraries in a folder of its own. Skips the test where there is no C++ compiler."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.folder = folder
        self.flags = flags
        module = folder / "simt_kernels.so"
        includes: list[str | Path] = [HERE / "include", CSRC / "bindings"]
        includes += [pybind11.get_include(), sysconfig.get_path("include")]
        self._compile(HERE / "kernels.cpp", module, *(f"-I{path}" for path in includes))
        spec = importlib.util.spec_from_file_location("simt_kernels", module)
        assert spec is not None
        assert spec.loader is not None
        self._module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self._module)

    def build(
        self, op: str, source: str | None = None, name: str | None = None, flags: Sequence[str] = ()
    ) -> Any:
        """A stand-in for blip3o_rt._cuda that has the ops of one .cu file, made of it or of another text.

        op: one of them. A name (that of the file unless given) can be built once. flags: of the compiler.
        """
        file = file_of(op)
        name = name or file
        kernel, library = self.folder / f"{name}.cu", self.folder / f"{name}.so"
        kernel.write_text(source or source_of(op))
        definitions = [f'-DKERNEL_SOURCE="{kernel}"', f"-DKERNEL_OP={file}"]
        self._compile(HERE / "entry.cpp", library, f"-I{HERE / 'include'}", *definitions, *self.flags, *flags)
        opened = self._module.Library(str(library))
        sizes = [name for name in dir(self._module) if name.endswith("_workspace")]
        found = {name: getattr(opened, name) for name in ops_of(file)}
        found |= {name: getattr(self._module, name) for name in sizes}
        own = (name for name in dir(opened) if name.startswith("set_") or name == "dependent_launches")
        found |= {name: getattr(opened, name) for name in own}
        return SimpleNamespace(**found)

    def _compile(self, source: Path, target: Path, *flags: str) -> None:
        compiler = shutil.which(os.environ.get("CXX", "g++"))
        if compiler is None:
            pytest.skip("needs a C++ compiler")
        common = ["-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Werror"]
        common.append("-Wno-unknown-pragmas")  # unroll
        includes = [f"-I{CSRC}", f"-I{CSRC / 'include'}"]
        options = [*common, *includes, *flags]
        kernel = target.with_suffix(".cu")
        read = [kernel.read_text() if kernel.exists() else "", *(o for o in options if str(kernel) not in o)]
        kept = KEPT / f"{fingerprint(compiler, source, *read)}.so"
        KEPT.mkdir(parents=True, exist_ok=True)
        with kept.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another worker may be at the same
            if not kept.exists():
                subprocess.run([compiler, *options, str(source), "-o", str(target), "-ldl"], check=True)
                replacing = kept.with_suffix(".new")
                shutil.copyfile(target, replacing)
                replacing.rename(kept)
        shutil.copyfile(kept, target)  # a library of its own, with state of its own


@functools.cache
def fingerprint(compiler: str, source: Path, *read: str) -> str:
    """A hash of what a compilation depends on: the compiler, its options and every file that it may read."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256(repr((version, sys.version, pybind11.__version__, source.name, read)).encode())
    for path in sorted(path for folder in (CSRC, HERE) for path in folder.rglob("*.*")):
        if path.suffix in (".h", ".inc", ".cpp", ".cu"):
            digest.update(path.read_bytes())
    return digest.hexdigest()
