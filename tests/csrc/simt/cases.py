"""The cases of the ops on an op's CUDA implementation, with its module replaced by one for the CPU.

`main` is for a process of its own, started with a sanitizer's runtime loaded first.
"""

from __future__ import annotations

import functools
import itertools
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip3o_rt import ops
from blip3o_rt.measure.cases import cases_of, check_of
from blip3o_rt.measure.cases.attention import decode_case, paged_case, prefill_case
from blip3o_rt.measure.validate.case import DTYPES, Case, copies, outputs, run_exact
from blip3o_rt.measure.validate.finding import Finding
from blip3o_rt.ops import native
from tests.csrc.simt.build import CSRC, SimtCompiler, ops_of

FILES = sorted(path.stem for path in (CSRC / "cuda").glob("*.cu"))
OPS = [op for file in FILES for op in ops_of(file)]


def size(case: Case) -> int:
    """Elements of all arguments: roughly how long a case takes."""
    return sum(a.numel() for a in (*case.arguments, *case.options.values()) if isinstance(a, Tensor))


@functools.cache
def examples(op_name: str) -> list[tuple[Case, list[Tensor]]]:
    """The cases of an op with their exact results, small ones first."""
    cases = sorted(cases_of(op_name), key=size)
    return [(case, run_exact(ops.all_ops()[op_name], case)) for case in cases]


def errors(op_name: str, case: Case, exact: list[Tensor]) -> list[Finding]:
    """What differs from the reference by more than it may, on native.cuda(); a refused case has no errors."""
    op = ops.all_ops()[op_name]
    implementation = op.named("cuda")
    arguments, options = copies(case)
    bound = op.bind(*arguments, **options)
    if implementation.takes("cuda", arguments[0].dtype) or implementation.refusal(bound):
        return []
    result: Any = implementation.run(bound)
    results = outputs(case, arguments, options, result)
    return [found for found in check_of(op_name)(op, case, results, exact) if not found.passed]


PAGED = {
    "paged_decode_attention": paged_case,
    "paged_prefill_attention": prefill_case,
    "decode_attention": decode_case,
}
"""Ops that attend to pages, with what makes a case of them."""


def unseen_pages(op_name: str) -> list[str]:
    """Pages that do not exist and do not make NaN of what attends to them, and of that alone, in each of an
    op's kernels on native.cuda()."""
    op = ops.all_ops()[op_name]
    place = op.argument_names.index("k_cache")  # v_cache and page_table follow
    implementation = op.named("cuda")
    prompts, found = op_name == "paged_prefill_attention", []
    for dtype, head_dim in itertools.product(DTYPES, (24, 64, 128)):
        lengths = [[10, 5]] * (2 if prompts else 1)
        case = PAGED[op_name]("", dtype, *lengths, 4, 2, head_dim, 4)
        if implementation.refusal(op.bind(*case.arguments)):
            continue
        expected = implementation.run(op.bind(*copies(case)[0]))
        expected[4 if prompts else 0 : 10 if prompts else 1] = torch.nan  # from the second page on
        for page in (-1, -(2**31), len(case.arguments[place])):
            arguments, _ = copies(case)
            arguments[place : place + 2] = (surrounded(cache) for cache in arguments[place : place + 2])
            arguments[place + 2][0, 1] = page
            result = implementation.run(op.bind(*arguments))
            if not torch.allclose(result, expected, rtol=0, atol=0, equal_nan=True):
                found.append(f"page {page}, {dtype}, heads of {head_dim}")
    return found


def surrounded(cache: Tensor) -> Tensor:
    """The cache, with memory before and after its pages."""
    page = torch.ones_like(cache[:1])
    return torch.cat([page, cache, page])[1:-1]


def main(folder: str, *flags: str) -> None:
    """Compiles every kernel into `folder` with `flags` besides, and runs all cases; exits if one is wrong."""
    compiler = SimtCompiler(Path(folder), *flags)
    for file in FILES:
        kernels = compiler.build(file)
        native.cuda = lambda kernels=kernels: kernels  # type: ignore[misc]
        for op in ops_of(file):
            for case, exact in examples(op):
                if found := errors(op, case, exact):
                    sys.exit(f"{op}, {case.label}: {found}")
            print(f"{op}: every case is right")
