"""Counting what a stage runs, on tensors that have no memory: calls, launches and bytes by op."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from blip3o_rt import ops
from blip3o_rt.ops.registry import Implementation, Op

AnyOp = Op[Any, Any]


@dataclass
class Count:
    """Calls of one op, the kernels they launch on a GPU, and the bytes they move."""

    calls: int = 0
    launches: int = 0
    bytes: int = 0

    def add(self, launches: int, moved: int) -> None:
        self.calls += 1
        self.launches += launches
        self.bytes += moved


def total(counts: Iterable[Count]) -> Count:
    """All counts as one."""
    found = list(counts)
    return Count(*(sum(getattr(count, name) for count in found) for name in vars(Count())))


@contextmanager
def counted_ops(run: Callable[[AnyOp, Mapping[str, Any]], Any]) -> Iterator[None]:
    """Within the block a call of an op is run(op, its arguments by name), whatever was forced before."""
    before = {op: op.force(None) for op in ops.all_ops().values()}
    try:
        for op in before:
            op.force(_counting(op, run))
        yield
    finally:
        for op, implementation in before.items():
            op.force(implementation)


def _counting(op: AnyOp, run: Callable[[AnyOp, Mapping[str, Any]], Any]) -> Implementation:
    signature = inspect.signature(op.reference)

    def counted(*args: Any, **kwargs: Any) -> Any:
        return run(op, signature.bind(*args, **kwargs).arguments)

    return Implementation("counted", counted)


def as_text(counts: Mapping[str, Count]) -> str:
    """Counts and their total as a table."""
    rows = [
        [name, count.calls, count.launches, f"{count.bytes / 1e6:,.3f}"]
        for name, count in [*counts.items(), ("all", total(counts.values()))]
    ]
    aligned = ("left", *["right"] * 3)
    return tabulate(rows, ["op", "calls", "launches", "MB"], disable_numparse=True, colalign=aligned)
