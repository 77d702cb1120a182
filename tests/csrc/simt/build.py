"""Compiles .cu files for the CPU, against the headers in include/, and opens them from Python."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pybind11
import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[2] / "csrc"


class SimtCompiler:
    """Builds libraries in a folder of its own. Skips the test where there is no C++ compiler."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        module = folder / "simt_kernels.so"
        includes = [CSRC / "bindings", pybind11.get_include(), sysconfig.get_path("include")]
        self._compile(HERE / "kernels.cpp", module, *(f"-I{path}" for path in includes))
        spec = importlib.util.spec_from_file_location("simt_kernels", module)
        assert spec is not None
        assert spec.loader is not None
        self._module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self._module)

    def build(self, kernel_source: str, name: str) -> Any:
        """The kernels in the text of a .cu file, one method per op. A name can be built once."""
        kernel, library = self.folder / f"{name}.cu", self.folder / f"{name}.so"
        kernel.write_text(kernel_source)
        self._compile(HERE / "entry.cpp", library, f"-I{HERE / 'include'}", f'-DKERNEL_SOURCE="{kernel}"')
        return self._module.Library(str(library))

    def _compile(self, source: Path, target: Path, *flags: str) -> None:
        compiler = shutil.which(os.environ.get("CXX", "g++"))
        if compiler is None:
            pytest.skip("needs a C++ compiler")
        common = ["-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Werror"]
        includes = [f"-I{CSRC}", f"-I{CSRC / 'include'}"]
        subprocess.run(
            [compiler, *common, *includes, *flags, str(source), "-o", str(target), "-ldl"], check=True
        )
