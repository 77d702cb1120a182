"""Kernels compiled for one instruction set define nothing that code for other machines could be linked to.

`make test` compiles one file; the rest is exhaustive.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
KERNELS = [path for path in sorted((CSRC / "cpu").glob("*.cpp")) if "BLIP3O_ISA" in path.read_text()]
TABLED = [
    pytest.param(path, id=path.stem, marks=() if path.stem == "silu_mul" else pytest.mark.exhaustive)
    for path in KERNELS
]


def test_kernel_files_are_found() -> None:
    assert {"rms_norm", "row_linear", "paged_decode_attention"} <= {path.stem for path in KERNELS}


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="needs an x86-64 machine")
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
@pytest.mark.parametrize("source", TABLED)
def test_symbols_stay_in_their_namespace(source: Path, tmp_path: Path) -> None:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    flags = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-Wno-psabi"]
    definitions = ["-DBLIP3O_ISA=avx512", "-DBLIP3O_VECTOR_BYTES=64"]
    compiled = tmp_path / "kernel.o"  # unoptimized: then even what is always inlined elsewhere would show
    command = [compiler, "-std=gnu++17", "-O0", *flags, *definitions, f"-I{CSRC}", f"-I{CSRC / 'include'}"]
    subprocess.run([*command, "-c", str(source), "-o", str(compiled)], check=True)
    listing = subprocess.run(
        ["nm", "--demangle", "--defined-only", "--extern-only", str(compiled)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    symbols = [line.split(maxsplit=2)[2] for line in listing.splitlines()]
    foreign = {symbol for symbol in symbols if "blip3o::cpu::avx512::" not in symbol}
    assert symbols
    assert foreign <= {"DW.ref.__gxx_personality_v0"}  # a pointer, the same in every file
