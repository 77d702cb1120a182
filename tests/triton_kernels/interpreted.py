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
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from blip3o_rt import ops
from blip3o_rt.validate.case import Case, copies, outputs, run_exact
from blip3o_rt.validate.sweep import cases_of, check_of

ROOT = Path(__file__).parents[2]
OPS = sorted(name for name, op in ops.all_ops().items() if "triton" in op.implementation_names)


def name_of(case: Case) -> str:
    """A case within its op."""
    return f"{str(case.arguments[0].dtype).removeprefix('torch.')}-{case.label}"


def errors(op_name: str, case: Case) -> list[str]:
    """What differs from the reference by more than it may; why, where the kernels do not take the case."""
    op = ops.all_ops()[op_name]
    implementation = op.named("triton")
    arguments, options = copies(case)
    reason = implementation.supports(*arguments, **options)
    if reason is not None:
        return [f"not taken: {reason}"]
    result: Any = implementation.run(*arguments, **options)
    found = check_of(op_name)(op, case, outputs(case, arguments, options, result), run_exact(op, case))
    return [str(finding) for finding in found if not finding.passed]


def lines(op_names: Sequence[str], *, until_wrong: bool = False) -> Iterator[dict[str, Any]]:
    """A line per case; with until_wrong the last is the first that is not right."""
    for op_name in op_names:
        for case in cases_of(op_name).cases():
            begin = time.perf_counter()
            try:
                found = errors(op_name, case)
            except Exception as error:
                found = [f"raised {type(error).__name__}: {error}"]
            yield {
                "op": op_name,
                "case": name_of(case),
                "errors": found,
                "seconds": time.perf_counter() - begin,
            }
            if found and until_wrong:
                return


def replace_source(op_name: str, path: Path) -> None:
    """Let an op's kernels be those of another file."""
    name = f"triton_kernels.{op_name}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


def run(*arguments: str) -> list[dict[str, Any]]:
    """This program's lines, from a process of its own."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.triton_kernels.interpreted", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def main(*arguments: str) -> None:
    """OPS...: all their cases. OP FILE: the op's cases on that file's kernels, up to the first wrong one."""
    from tests.triton_kernels import bfloat16

    bfloat16.install()
    faulty = len(arguments) == 2 and arguments[1].endswith(".py")
    if faulty:
        replace_source(arguments[0], Path(arguments[1]))
    for line in lines(arguments[:1] if faulty else arguments, until_wrong=faulty):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
