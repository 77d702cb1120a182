"""Times of calls that race each other: in turns, so that a noisy machine is as noisy to all of them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from blip3o_rt.measure.bench.memory import PeakMemory


def nothing() -> None:
    """The preparation of a call that needs none."""


@dataclass
class Contender:
    """Somebody's way of doing a line's work: `call` is timed, `prepare` runs before it and is not."""

    who: str
    call: Callable[[], Any]
    prepare: Callable[[], object] = nothing


@dataclass
class Timing:
    """Seconds of a contender's first call and of later ones, its peak memory, and why it stopped early."""

    cold: float | None = None
    samples: list[float] = field(default_factory=list)
    peak_memory: int | None = None
    error: Exception | None = None

    def remember_peak(self, peak: int | None) -> None:
        if peak is not None:
            self.peak_memory = max(peak, self.peak_memory or 0)


@dataclass(frozen=True)
class Plan:
    """How often a line is called: up to `runs` rounds, and none after the first that would pass `seconds`.

    The seconds count the cold calls too.
    """

    runs: int
    seconds: float


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """How long a call takes; on a GPU until the last of its work is done, by the device's own clock."""
    if device.type != "cuda":
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    first.record()
    call()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1000


def race(
    contenders: Sequence[Contender], timings: Sequence[Timing], device: torch.device, plan: Plan
) -> None:
    """Call every contender once, cold, then in rounds in which they take turns, and fill in their timings.

    The order alternates from round to round. A contender that raises keeps its error and what it did before,
    and the others go on. What ends the race from outside (KeyboardInterrupt) leaves the timings so far.
    """
    memory = PeakMemory(device)
    end = time.perf_counter() + plan.seconds
    with quiet():
        for contender, timing in zip(contenders, timings, strict=True):
            timing.cold = _attempt(contender, timing, device, memory)
        longest = 0.0
        for number in range(plan.runs):
            begin = time.perf_counter()
            running = [pair for pair in zip(contenders, timings, strict=True) if pair[1].error is None]
            if not running or (number and begin + longest > end):
                return
            for contender, timing in running if number % 2 else reversed(running):
                found = _attempt(contender, timing, device, memory)
                if found is not None:
                    timing.samples.append(found)
            longest = max(longest, time.perf_counter() - begin)


def _attempt(contender: Contender, timing: Timing, device: torch.device, memory: PeakMemory) -> float | None:
    """The seconds of one call, None where it raised."""
    try:
        contender.prepare()
        memory.begin()
        found = seconds(contender.call, device)
    except Exception as error:  # a peer may fail in any way, and the others' times are still wanted
        timing.error = error
        return None
    timing.remember_peak(memory.read())
    return found


@contextmanager
def quiet() -> Iterator[None]:
    """Within the block no garbage is collected and no gradients are recorded: neither is anybody's work."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        with torch.no_grad():
            yield
    finally:
        if enabled:
            gc.enable()
