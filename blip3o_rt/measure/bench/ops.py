"""Times of every op's implementations, each checked first, on inputs that do not sit in a cache."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip3o_rt import ops
from blip3o_rt.checkpoint.parts import DTYPES
from blip3o_rt.graphs import GraphRunner
from blip3o_rt.measure.bench.lines import Settings
from blip3o_rt.measure.bench.subject import Subject
from blip3o_rt.measure.bench.timing import Candidate, device_clock, quiet, sample
from blip3o_rt.measure.cases.model_shapes import OpShape, op_shapes
from blip3o_rt.measure.records import BenchRecord, OpTime
from blip3o_rt.measure.units import time_text
from blip3o_rt.measure.validate.case import Case, copies
from blip3o_rt.measure.validate.finding import Finding
from blip3o_rt.measure.validate.sweep import findings, refusal
from blip3o_rt.ops.registry import Op

MORE_RUNS = 3  # an op is short: so many times the rounds of a line
SECONDS, QUICK_SECONDS = 1.0, 0.02  # of one implementation at one shape
DEFAULT_CACHE_BYTES = 2**26  # where the system does not tell the size of its last-level cache
LARGEST_CACHE_BYTES = 2**28
MAX_COPIES = 256


def time_ops(subject: Subject, settings: Settings, record: BenchRecord, log: Callable[[str], None]) -> None:
    """Record every chosen op x shape x dtype x implementation that runs on the device."""
    names, runs = settings.op_names or (), settings.runs * MORE_RUNS
    limit = QUICK_SECONDS if settings.quick else SECONDS
    for shape in op_shapes(subject.config(), settings.batches):
        if shape.op not in names:
            continue
        op = ops.all_ops()[shape.op]
        for name, dtype in DTYPES.items():
            if dtype in shape.dtypes:
                for entry in time_shape(op, shape, dtype, subject.device, runs, limit):
                    bound = record.bound(
                        entry.bytes or 0, entry.flops or 0, name, "read" if shape.reads else "copy"
                    )
                    if bound is not None and entry.median:
                        entry.roofline, entry.utilization = bound[0], bound[1] / entry.median
                    entry.dtype = name
                    record.add(entry)
                    log(summary(entry))


def time_shape(
    op: Op[Any, Any], shape: OpShape, dtype: torch.dtype, device: torch.device, runs: int, limit: float
) -> Iterator[OpTime]:
    """An entry for each implementation that takes the shape in the dtype; they are timed in turns.

    One that gives no result of the right kind is not timed.
    """
    case = shape.make(dtype)
    names = [i.name for i in op.implementations if refusal(op, i, case, device.type) is None]
    checked = {name: check(op, shape, dtype, name, device) for name in names}
    rotation = Rotation(case, device)
    able = [name for name in names if math.isfinite(checked[name].found)]
    samples: dict[str, list[float]] = {name: [] for name in names}
    samples |= rotate(op, rotation, able, device, runs, limit)
    arguments, options = rotation.arguments[0]
    work = shape.work(case, op.reference(*arguments, **options))
    del rotation
    gc.collect()
    for name in names:
        finding = checked[name]
        yield OpTime(
            op=op.name,
            implementation=name,
            shape=shape.label,
            samples=tuple(samples[name]),
            bytes=work.bytes,
            flops=work.flops or None,
            error=finding.found if math.isfinite(finding.found) else None,
            bound=finding.bound,
            ok=finding.passed,
            note=finding.detail or None,
        )


def check(
    op: Op[Any, Any], shape: OpShape, dtype: torch.dtype, implementation: str, device: torch.device
) -> Finding:
    """The worst finding against the float64 reference, at the shape or at the smaller one standing for it."""
    found = findings(op, implementation, shape.make_small(dtype), device.type)
    return next((f for f in found if not f.passed), max(found, key=lambda f: f.found))


class Rotation:
    """Copies of a case's inputs, taken in turn, so that no cache holds what a call is given.

    Where all copies together fit the caches, these are emptied before the copies are taken again: `emptied`
    says that the last `take` did so. The code of a call is then as cold as its inputs, which in a model it
    is not, so a call that is not timed goes first.
    """

    def __init__(self, case: Case, device: torch.device) -> None:
        tensors = [t for t in (*case.arguments, *case.options.values()) if isinstance(t, Tensor)]
        size = max(1, sum(t.numel() * t.element_size() for t in tensors))
        wanted = 2 * cache_bytes(device)
        self.arguments = [copies(case, str(device)) for _ in range(min(MAX_COPIES, -(-wanted // size)))]
        self.emptied = False
        self._fits = size * len(self.arguments) < wanted
        self._buffer = torch.ones(wanted // 4 if self._fits else 0, device=device)
        self._place = len(self.arguments)

    def take(self) -> tuple[list[Any], dict[str, Any]]:
        """Positional and named arguments that no cache holds."""
        self.emptied = False
        if self._place == len(self.arguments):
            self._place, self.emptied = 0, self._fits
            if self._fits:
                self._buffer.add_(1) if self._buffer.is_cuda else self._buffer.sum()
        self._place += 1
        return self.arguments[self._place - 1]


def rotate(
    op: Op[Any, Any], rotation: Rotation, names: Sequence[str], device: torch.device, runs: int, limit: float
) -> dict[str, list[float]]:
    """Samples of each implementation, in turns; at least one, then no more than `limit` seconds allow.

    On a GPU a sample is the replay of a graph that has a call on every copy of the inputs.
    """
    samples: dict[str, list[float]] = {name: [] for name in names}
    spent = dict.fromkeys(names, 0.0)
    clock = device_clock(device)
    take: dict[str, Callable[[], float]]
    if clock is None:
        take = {name: partial(_cold_call, op, name, rotation) for name in names}
    else:
        graphs = {name: Candidate(name, _graph(op, name, rotation, device)) for name in names}
        copies_made = len(rotation.arguments)

        def replayed(graph: Candidate) -> float:
            return sample(graph, clock)[0] / copies_made

        take = {name: partial(replayed, graph) for name, graph in graphs.items()}
    with quiet():
        for number in range(-1, runs):
            for name in names:
                if number > 0 and spent[name] * (number + 1) / number > limit:
                    continue
                taken = take[name]()
                if number >= 0:  # the first round warms up
                    samples[name].append(taken)
                    spent[name] += taken
    return samples


def _cold_call(op: Op[Any, Any], implementation: str, rotation: Rotation) -> float:
    """Seconds of a call on inputs that no cache holds, its code in the cache."""
    while True:
        arguments, options = rotation.take()
        call = op.bind(*arguments, **options)
        taken, _ = sample(Candidate("", partial(op.named(implementation).run, call)), None)
        if not rotation.emptied:
            return taken


def _graph(
    op: Op[Any, Any], implementation: str, rotation: Rotation, device: torch.device
) -> Callable[[], Any]:
    """A captured call on every copy of the inputs."""

    calls = [op.bind(*arguments, **options) for arguments, options in rotation.arguments]
    run = op.named(implementation).run

    def everything() -> None:
        for call in calls:
            run(call)

    return GraphRunner.of(device).capture("bench op", everything)


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache, bounded: some machines report those of all their sockets together."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [_cache_size(path) for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return min(max(sizes, default=DEFAULT_CACHE_BYTES), LARGEST_CACHE_BYTES)


def _cache_size(path: Path) -> int:
    """Bytes, of a file that says "32768K"."""
    text = path.read_text().strip()
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    return int(text[:-1]) * units[text[-1]] if text[-1:] in units else int(text or 0)


def summary(entry: OpTime) -> str:
    """An entry in one line of text."""
    return f"{entry.label}: {time_text(entry.median)} (n={entry.count}){'' if entry.ok else ' WRONG'}"
