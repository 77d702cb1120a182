"""The CUDA kernels touch no memory but their tensors': every case on the CPU under AddressSanitizer.

`make test` runs one kernel, right and with a bound missing; the rest is exhaustive.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

ALL = """
import sys
from tests.csrc.simt.cases import main
main(sys.argv[1], "-fsanitize=address")
"""

RIGHT_THEN_FAULTY = """
import sys
from pathlib import Path
from blip3o_rt.ops import native
from tests.csrc.simt import build, cases
from tests.planting import plant
compiler = build.SimtCompiler(Path(sys.argv[1]), "-fsanitize=address")
bound = "if (column >= a.out.width) return;"
sources = {"right": build.source_of("silu_mul")}
sources["faulty"] = plant(sources["right"], bound, "")
for name, source in sources.items():
    kernels = compiler.build("silu_mul", source, name)
    native.cuda = lambda: kernels
    assert not any(cases.errors("silu_mul", case, exact) for case, exact in cases.examples("silu_mul"))
    print(name, flush=True)
"""


def run(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a program of Python with the sanitizer's runtime loaded first."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    asked = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True)
    if not Path(asked.stdout.strip()).is_absolute():
        pytest.skip("needs AddressSanitizer's runtime (libasan)")
    return subprocess.run(
        [sys.executable, "-c", program, str(folder)],
        cwd=ROOT,
        env={**os.environ, "LD_PRELOAD": asked.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0"},
        capture_output=True,
        text=True,
    )


@pytest.mark.exhaustive
def test_every_case_stays_inside(tmp_path: Path) -> None:
    done = run(ALL, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_kernel_stays_inside_and_a_missing_bound_is_caught(tmp_path: Path) -> None:
    done = run(RIGHT_THEN_FAULTY, tmp_path)
    assert done.stdout.split() == ["right"], done.stderr
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
