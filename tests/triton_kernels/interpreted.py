"""The cases of the ops on their Triton kernels, interpreted on the CPU; TRITON_INTERPRET=1 must be set.

As a program (`python -m tests.triton_kernels.interpreted OPS...`): prints a line of JSON for every case. So
the interpreter stays out of the process that asks.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip3o_rt import ops
from blip3o_rt.measure.cases import cases_of, check_of
from blip3o_rt.measure.cases.linear import gated_case
from blip3o_rt.measure.validate.case import Case, copies, outputs, random, run_exact
from blip3o_rt.ops.registry import usable
from blip3o_rt.precision import BF16

ROOT = Path(__file__).parents[2]
OPS = sorted(name for name, op in ops.all_ops().items() if "triton" in op.implementation_names)

ROWS, IMAGES = "rows of a product, together and apart", "images of a step, together and apart"
GATED = "a product that is added through a gate, and its two parts"

# Cases that smaller ones stand for, since a tile takes the interpreter milliseconds.
TOO_MANY_PROGRAMS = {
    "560 channels",
    "wide rows",
    "384 keys",
    "730 keys",
    "3001 keys",
    "counts of 500 keys",
}


def size(case: Case) -> int:
    """Elements of all arguments: roughly how long a case takes."""
    return sum(a.numel() for a in (*case.arguments, *case.options.values()) if isinstance(a, Tensor))


def name_of(case: Case) -> str:
    """A case within its op."""
    return f"{str(case.arguments[0].dtype).removeprefix('torch.')}-{case.label}"


def errors(op_name: str, case: Case) -> list[str]:
    """What differs from the reference by more than it may; why, where the kernels do not take the case."""
    op = ops.all_ops()[op_name]
    implementation = op.named("triton")
    arguments, options = copies(case)
    bound = ops.all_ops()[op_name].bind(*arguments, **options)
    reason = implementation.refusal(bound)
    if reason is not None:
        return [f"not taken: {reason}"]
    result: Any = implementation.run(bound)
    found = check_of(op_name)(op, case, outputs(case, arguments, options, result), run_exact(op, case))
    return [str(finding) for finding in found if not finding.passed]


def cases(op_name: str) -> list[Case]:
    """The op's cases but those that have too many programs to interpret, small ones first.

    Nor those that ask for int8, which a GPU multiplies nothing with.
    """
    found = [
        case
        for case in cases_of(op_name)
        if case.label not in TOO_MANY_PROGRAMS and case.options.get("dtype") != torch.int8
    ]
    return sorted(found, key=size)


def lines(op_name: str, step: int = 1) -> Iterator[dict[str, Any]]:
    """A line for each of an op's cases, or for every `step`-th."""
    for case in cases(op_name)[::step]:
        try:
            found = errors(op_name, case)
        except Exception as error:
            found = [f"raised {type(error).__name__}: {error}"]
        yield {"op": op_name, "case": name_of(case), "errors": found}


def first_wrong(op_name: str, file_name: str, path: Path) -> list[str]:
    """What the first wrong case says with a file of kernels replaced; nothing where all are right."""
    kernel, replaced = (f"blip3o_rt.triton_kernels.{name}" for name in (op_name, file_name))
    spec = importlib.util.spec_from_file_location(replaced, path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules.pop(kernel, None)
    sys.modules[replaced] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return next((line["errors"] for line in lines(op_name) if line["errors"]), [])
    finally:
        sys.modules.pop(kernel, None)
        sys.modules.pop(replaced, None)


def dependent_rows() -> list[str]:
    """Rows whose product with a matrix changes with the rows beside them; a tile has 128."""
    shapes = (150, 150), (70, 150), (70,)
    x, weight, bias = (random(seed, *shape, dtype=torch.bfloat16) for seed, shape in enumerate(shapes))
    product = ops.linear.named("triton").run
    together = product(ops.linear.bind(x, weight, bias))
    parts = (slice(1), slice(3, 130), slice(127, 129), slice(140, 150))
    alone = ((rows, product(ops.linear.bind(x[rows], weight, bias))) for rows in parts)
    return [str(rows) for rows, found in alone if not torch.equal(found, together[rows])]


def other_gated_bits() -> list[str]:
    """Rows whose product, added through a gate, has not the bits of the product and the addition."""
    x, weight, residual, gate, bias = gated_case("", torch.bfloat16, 140, 150, 96).arguments
    parts = ops.linear.named("triton").run(ops.linear.bind(x, weight, bias))
    expected = ops.gated_add.named("triton").run(ops.gated_add.bind(residual.clone(), parts, gate))
    fused = ops.linear_gated_add.named("triton").run
    found = []
    for rows in (slice(None), slice(1), slice(127, 129), slice(60, 140)):
        bound = ops.linear_gated_add.bind(x[rows], weight, residual[rows].clone(), gate, bias)
        if not torch.equal(fused(bound), expected[rows]):
            found.append(str(rows))
    return found


def dependent_images() -> list[str]:
    """Numbers of images whose step, on these products, is not that of each alone."""
    from tests.dit import test_sharing  # which imports diffusers, for seconds

    dit, found = test_sharing.dit_of(BF16), []
    products = [
        op.forcing(replace(op.named("triton"), device=None, available=usable))
        for op in (ops.linear, ops.linear_gated_add)
    ]
    with torch.no_grad(), products[0], products[1]:
        assert dit.batch_invariant
        alone = [test_sharing.shared(dit, [seed])[0] for seed in range(8)]
        for count in (2, 4, 8):
            together = test_sharing.shared(dit, range(count))
            if not all(map(torch.equal, together, alone)):
                found.append(f"{count} images")
    return found


def run(*arguments: str) -> list[dict[str, Any]]:
    """This program's lines, from a process of its own."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.triton_kernels.interpreted", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def main(*arguments: str) -> None:
    """OP: all its cases. OP:5: every fifth. OP:FILE=PATH: one line, with that file of kernels replaced.

    ROWS, IMAGES and GATED: one line.
    """
    from tests.triton_kernels import interpreter

    interpreter.install()
    checks = {ROWS: dependent_rows, IMAGES: dependent_images, GATED: other_gated_bits}
    for argument in arguments:
        op_name, _, choice = argument.partition(":")
        file_name, replaced, path = choice.partition("=")
        if argument in checks:
            print(json.dumps({"case": argument, "errors": checks[argument]()}))
        elif replaced:
            print(json.dumps({"fault": argument, "errors": first_wrong(op_name, file_name, Path(path))}))
        else:
            for line in lines(op_name, int(choice or 1)):
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
