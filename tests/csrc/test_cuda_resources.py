"""Registers, shared memory and stack of every CUDA kernel are those of the table, and none spills.

`make test` compiles one op for one architecture; the rest is exhaustive.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.csrc.resources import ARCHITECTURES, OPS, TABLE, kernel_name, measure, parse, release

NVCC = shutil.which("nvcc")
TABLED = [
    pytest.param(op, name, marks=() if (op, name) == ("silu_mul", "sm_90a") else pytest.mark.exhaustive)
    for op in OPS
    for name in ARCHITECTURES
]
UPDATE = "if that is meant, write the table anew: python -m tests.csrc.resources"


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize(("op", "architecture"), TABLED)
def test_resources(op: str, architecture: str, tmp_path: Path) -> None:
    assert NVCC is not None
    kernels = measure(NVCC, op, architecture, tmp_path)
    assert kernels
    for kernel, resources in kernels.items():
        assert resources.spills == 0, f"{kernel} spills {resources.spills} bytes on {architecture}"
    table = json.loads(TABLE.read_text())
    if release(NVCC) != table["nvcc"]:
        pytest.skip(f"nothing spills; the table is of nvcc {table['nvcc']}, this is {release(NVCC)}")
    found = {f"{architecture} {kernel}": str(resources) for kernel, resources in kernels.items()}
    assert found == {name: table.get(name) for name in found}, UPDATE


WORDS = """
ptxas info    : Compiling entry function '_ZN6blip3o4cuda3abc1kI13__nv_bfloat16Li8EEEvNS_1AE' for 'sm_80'
ptxas info    : Function properties for _ZN6blip3o4cuda3abc1kI13__nv_bfloat16Li8EEEvNS_1AE
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 48 registers, used 1 barriers, 48 bytes cumulative stack size, 32 bytes smem
ptxas info    : Function properties for _ZN6blip3o4cuda3abc5scoreEy
    32 bytes stack frame, 4 bytes spill stores, 0 bytes spill loads
ptxas info    : Compiling entry function '_ZN6blip3o4cuda3abc11draw_kernelENS_1AE' for 'sm_80'
ptxas info    : Function properties for _ZN6blip3o4cuda3abc11draw_kernelENS_1AE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 20 registers, used 0 barriers
"""


def test_words_of_the_compiler() -> None:
    """A function that a kernel calls spills on its account."""
    kernels = parse(WORDS)
    assert list(kernels) == ["k<bf16, 8>", "draw_kernel"]
    assert str(kernels["k<bf16, 8>"]) == "48 registers, 32 B shared, 16 B stack"
    assert kernels["k<bf16, 8>"].spills == 24
    assert str(kernels["draw_kernel"]) == "20 registers, 0 B shared, 0 B stack"


def test_names_with_choices() -> None:
    assert kernel_name("_ZN6blip3o4cuda3abc1kILi4ELb1EEEvi") == "k<4, true>"


def test_names_with_types() -> None:
    assert kernel_name("_ZN6blip3o4cuda3abc1kINS1_4Int8ELi1ELb0EEEvi") == "k<Int8, 1, false>"
    assert kernel_name("_ZN6blip3o4cuda3abc1kIaLi1EEEvi") == "k<int8, 1>"
    assert kernel_name("_ZN6blip3o4cuda3abc1kINS1_4Int8ELNS1_5LoadsE2ELb1EEEvi") == "k<Int8, Loads 2, true>"
