"""Kernels of a user's own: Python files that register implementations, loaded for a while and in front."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from blip3o_rt.errors import OpError
from blip3o_rt.ops.registry import all_ops


@dataclass(frozen=True)
class UserKernel:
    """An implementation that a file registered, by the names of its op and its own."""

    op: str
    implementation: str
    file: Path


@contextmanager
def load_kernels(paths: Iterable[str | Path]) -> Iterator[list[UserKernel]]:
    """Within the block, the implementations that the Python files register come first for their ops.

    A call that one of them does not support (its device, dtypes, `supports`, `available`) goes where it went
    before. The block is given what was registered, in the order of files and ops; afterwards all of it is
    withdrawn. Raises OpError, one line that names the file, where a file cannot be run or registers nothing.
    """
    kernels: list[UserKernel] = []
    try:
        for path in paths:
            known = _registered()
            try:
                _run(Path(path))
            finally:  # what a file registered before it failed is withdrawn too
                found = [UserKernel(*names, Path(path)) for names in _registered() if names not in known]
                kernels += found
            if not found:
                raise OpError(f"{path}: registers no kernel; decorate one with @ops.<op>.implementation(...)")
        for kernel in reversed(kernels):  # the first file's come first
            all_ops()[kernel.op].prefer(kernel.implementation)
        yield list(kernels)
    finally:
        for kernel in kernels:
            all_ops()[kernel.op].withdraw(kernel.implementation)


def _registered() -> list[tuple[str, str]]:
    return [(name, i) for name, op in sorted(all_ops().items()) for i in op.implementation_names]


def _run(path: Path) -> None:
    """Execute a file as a module of its own. Raises OpError with the line at fault."""
    if not path.is_file():
        raise OpError(f"{path}: there is no such file; accepted is a Python file that registers kernels")
    name = f"blip3o_rt_user_kernels.{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise OpError(f"{path}: accepted is a Python file, whose name ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses, pickles and Triton look for it
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        detail = next(iter(str(error).splitlines()), "")
        raise OpError(f"{path}{_line_at_fault(error, path)}: {type(error).__name__}: {detail}") from error


def _line_at_fault(error: Exception, path: Path) -> str:
    """ ", line N" of the file, the innermost of its lines in the traceback; empty where there is none."""
    lines = [error.lineno] if isinstance(error, SyntaxError) and error.filename == str(path) else []
    frames = traceback.extract_tb(error.__traceback__)
    lines += [frame.lineno for frame in frames if frame.filename == str(path)]
    return f", line {lines[-1]}" if lines else ""
