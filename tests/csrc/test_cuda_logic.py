"""The CUDA kernels' logic on the CPU, thread by thread, against the ops' references in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from blip3o_rt import ops
from blip3o_rt.validate.case import Case, copies, outputs, run_exact
from blip3o_rt.validate.cases import rms_norm as rms_norm_cases
from tests.csrc.simt.build import CSRC, SimtCompiler

RMS_NORM = (CSRC / "cuda" / "rms_norm.cu").read_text()
CASES = list(rms_norm_cases.cases())


def run(module: Any, case: Case) -> list[Tensor]:
    arguments, options = copies(case)
    options = {"bias": None, "residual": None, **options}
    out = options.pop("out", torch.empty(arguments[0].shape, dtype=arguments[0].dtype))
    module.rms_norm(*arguments, options["bias"], options["residual"], out)
    return outputs(case, arguments, {**options, "out": out}, out)


def passes(module: Any, case: Case) -> bool:
    found = rms_norm_cases.check(ops.rms_norm, case, run(module, case), run_exact(ops.rms_norm, case))
    return all(finding.passed for finding in found)


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> SimtCompiler:
    return SimtCompiler(tmp_path_factory.mktemp("simt"))


@pytest.fixture(scope="module")
def kernels(compiler: SimtCompiler) -> Any:
    return compiler.build(RMS_NORM, "rms_norm")


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("case", CASES, ids=[f"{c.arguments[0].dtype}-{c.label}" for c in CASES])
def test_rms_norm(kernels: Any, case: Case, descending: bool) -> None:
    kernels.set_descending(descending)
    assert passes(kernels, case)


@pytest.mark.parametrize(
    ("fault", "correct"),
    [
        ("", "__syncthreads();"),  # a dropped barrier
        ("if (threadIdx.x < 64) __syncthreads();", "__syncthreads();"),  # a barrier that some never reach
        ("if (distance > 1) value +=", "value +="),  # a lane left out of the sum
        ("warp < kWarps - 1;", "warp < kWarps;"),
        ("from_float<T>(value)", "from_float<T>(bias ? value + to_float(b.element[e]) : value)"),
    ],
)
def test_planted_faults_are_caught(fault: str, correct: str, compiler: SimtCompiler) -> None:
    assert correct in RMS_NORM
    module = compiler.build(RMS_NORM.replace(correct, fault), f"fault{len(fault)}")

    def is_caught(case: Case, descending: bool) -> bool:
        module.set_descending(descending)
        try:
            return not passes(module, case)
        except RuntimeError:
            return True

    assert any(is_caught(case, descending) for case in CASES for descending in (False, True))
