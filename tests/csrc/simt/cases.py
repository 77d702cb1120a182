"""The cases of the ops on an op's CUDA implementation, with its module replaced by one for the CPU.

`main` is for a process of its own, started with a sanitizer's runtime loaded first.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from blip3o_rt import ops
from blip3o_rt.ops import native
from blip3o_rt.validate.case import Case, copies, outputs, run_exact
from blip3o_rt.validate.finding import Finding
from blip3o_rt.validate.sweep import cases_of, check_of
from tests.csrc.simt.build import CSRC, SimtCompiler, ops_of

FILES = sorted(path.stem for path in (CSRC / "cuda").glob("*.cu"))
OPS = [op for file in FILES for op in ops_of(file)]


def size(case: Case) -> int:
    """Elements of all arguments: roughly how long a case takes."""
    return sum(a.numel() for a in (*case.arguments, *case.options.values()) if isinstance(a, Tensor))


@functools.cache
def examples(op_name: str) -> list[tuple[Case, list[Tensor]]]:
    """The cases of an op with their exact results, small ones first."""
    cases = sorted(cases_of(op_name).cases(), key=size)
    return [(case, run_exact(ops.all_ops()[op_name], case)) for case in cases]


def errors(op_name: str, case: Case, exact: list[Tensor]) -> list[Finding]:
    """What differs from the reference by more than it may, on native.cuda(); a refused case has no errors."""
    op = ops.all_ops()[op_name]
    implementation = op.named("cuda")
    arguments, options = copies(case)
    if implementation.takes("cuda", arguments[0].dtype) or implementation.supports(*arguments, **options):
        return []
    result: Any = implementation.run(*arguments, **options)
    results = outputs(case, arguments, options, result)
    return [found for found in check_of(op_name)(op, case, results, exact) if not found.passed]


def main(folder: str, *flags: str) -> None:
    """Compiles every kernel into `folder` with `flags` besides, and runs all cases; exits if one is wrong."""
    compiler = SimtCompiler(Path(folder), *flags)
    for file in FILES:
        kernels = compiler.build(file)
        native.cuda = lambda kernels=kernels: kernels
        for op in ops_of(file):
            for case, exact in examples(op):
                if found := errors(op, case, exact):
                    sys.exit(f"{op}, {case.label}: {found}")
            print(f"{op}: every case is right")
