"""Tensors of one call on two GPUs are refused by name; the matcher is compiled alone, so it needs no GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"

PROGRAM = """
#include <cstdio>
#include <cstdlib>

#include "blip3o/ops/rms_norm.h"

using namespace blip3o;

static TensorView view_on(int device_index) {
    TensorView view;
    view.dtype = DType::f32;
    view.device = Device::cuda;
    view.device_index = device_index;
    view.ndim = 1;
    view.shape[0] = 4;
    view.stride[0] = 1;
    return view;
}

int main(int, char** argv) {
    const TensorView x = view_on(atoi(argv[1])), weight = view_on(atoi(argv[2]));
    const TensorView bias = view_on(atoi(argv[3]));
    try {
        RmsNorm::check(Device::cuda, x, weight, 1e-6, bias, std::nullopt, x);
        puts("accepted");
    } catch (const ArgumentError& error) {
        puts(error.what());
    }
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    folder = tmp_path_factory.mktemp("devices")
    source, target = folder / "devices.cpp", folder / "devices"
    source.write_text(PROGRAM)
    include = f"-I{CSRC / 'include'}"
    subprocess.run([compiler, "-std=c++17", include, str(source), "-o", str(target)], check=True)
    return target


@pytest.mark.parametrize(
    ("x", "weight", "bias", "answer"),
    [
        (0, 0, 0, "accepted"),
        (1, 1, 1, "accepted"),
        (0, 1, 0, "rms_norm: weight is on cuda:1; accepted: cuda:0 (as x)"),
        (1, 1, 0, "rms_norm: bias is on cuda:0; accepted: cuda:1 (as x)"),
    ],
)
def test_one_call_is_on_one_gpu(program: Path, x: int, weight: int, bias: int, answer: str) -> None:
    command = [str(program), str(x), str(weight), str(bias)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == answer
