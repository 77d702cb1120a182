"""Times of calls that take turns, so that a noisy machine is as noisy to all of them.

On a GPU the host stays off the path: the device sleeps while a whole sample is queued, and its own clock
times what it then does without a pause. Only where a candidate is eager is launching part of its work.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from blip3o_rt.measure.bench.memory import PeakMemory

AHEAD, LEAST_AHEAD = 2.0, 1e-4  # a sleep, over the host's time of the sample before; seconds
ATTEMPTS = 4  # to sleep long enough
CALIBRATION_CYCLES = 20_000_000


def nothing() -> None:
    """The preparation of a call that needs none."""


@dataclass
class Candidate:
    """One implementation of a case's work: `call` is timed, `prepare` runs before a sample and is not.

    Attributes:
        queued: calls of one sample on a GPU.
        eager: whether the host launches every kernel, which then is a part of its time.
        ahead: seconds that the device sleeps while a sample is queued, as learned from the sample before.
    """

    who: str
    call: Callable[[], Any]
    prepare: Callable[[], object] = nothing
    queued: int = 1
    eager: bool = False
    ahead: float = 0.0


@dataclass
class Timing:
    """Seconds of a candidate's first call and of later ones, its peak memory, and why it stopped early.

    host: seconds that the host took to queue a call, where a device did the work.
    """

    cold: float | None = None
    samples: list[float] = field(default_factory=list)
    host: float | None = None
    peak_memory: int | None = None
    error: Exception | None = None


class DeviceClock(Protocol):
    """A device's own clock, and its queue."""

    def synchronize(self) -> None:
        """Wait until nothing is queued."""

    def sleep(self, seconds: float) -> None:
        """Queue that the device does nothing for so long."""

    def host(self) -> float:
        """Seconds of the host's clock."""

    def mark(self) -> Any:
        """Queue a mark: a point in the device's time."""

    def between(self, first: Any, last: Any) -> float:
        """Seconds from mark to mark, once the device has passed both."""


class CudaClock:
    """The clock of a CUDA device (see DeviceClock)."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.synchronize()
        marks = [self.mark()]
        torch.cuda._sleep(CALIBRATION_CYCLES)
        marks.append(self.mark())
        self._cycles_per_second = CALIBRATION_CYCLES / self.between(*marks)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._device)

    def sleep(self, seconds: float) -> None:
        torch.cuda._sleep(int(seconds * self._cycles_per_second))

    def host(self) -> float:
        return time.perf_counter()

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, first: torch.cuda.Event, last: torch.cuda.Event) -> float:
        last.synchronize()
        return float(first.elapsed_time(last)) / 1000


_clocks: dict[torch.device, DeviceClock] = {}


def device_clock(device: torch.device) -> DeviceClock | None:
    """The clock of a device that works by itself; None for the CPU, where the host's tells."""
    if device.type != "cuda":
        return None
    if device not in _clocks:
        _clocks[device] = CudaClock(device)
    return _clocks[device]


def sample(candidate: Candidate, clock: DeviceClock | None) -> tuple[float, float | None]:
    """Seconds of a call, and those of the host to queue it (None where the host does the work).

    A sample of a device is `queued` calls in a row. Unless they are eager, the device sleeps until all are
    queued; a sample whose sleep was too short is taken again.
    """
    if clock is None:
        return first_call(candidate, clock), None
    for _ in range(ATTEMPTS):
        candidate.prepare()
        clock.synchronize()
        if candidate.ahead and not candidate.eager:
            clock.sleep(candidate.ahead)
        first, begin = clock.mark(), clock.host()
        for _ in range(candidate.queued):
            candidate.call()
        host = clock.host() - begin
        found = clock.between(first, clock.mark()) / candidate.queued
        if candidate.eager or host < candidate.ahead:
            break
        candidate.ahead = max(AHEAD * host, LEAST_AHEAD)
    return found, host / candidate.queued


def first_call(candidate: Candidate, clock: DeviceClock | None) -> float:
    """Seconds of one call with all that the host does in it."""
    candidate.prepare()
    begin = time.perf_counter()
    candidate.call()
    if clock is not None:
        clock.synchronize()
    return time.perf_counter() - begin


def race(candidates: Sequence[Candidate], timings: Sequence[Timing], device: torch.device, runs: int) -> None:
    """Call every candidate once, cold, then in `runs` rounds in which they take turns; fills in the timings.

    The order alternates from round to round. A candidate that raises keeps its error and what it did before,
    and the others go on. What ends the race from outside (KeyboardInterrupt) leaves the timings so far.
    """
    memory, clock = PeakMemory(device), device_clock(device)
    pairs = list(zip(candidates, timings, strict=True))
    with quiet():
        for candidate, timing in pairs:
            timing.cold = _attempt(candidate, timing, memory, clock, cold=True)
        for number in range(runs):
            for candidate, timing in pairs if number % 2 else reversed(pairs):
                if timing.error is None:
                    found = _attempt(candidate, timing, memory, clock)
                    if found is not None:
                        timing.samples.append(found)


def _attempt(
    candidate: Candidate, timing: Timing, memory: PeakMemory, clock: DeviceClock | None, cold: bool = False
) -> float | None:
    """The seconds of a call; None where it raised."""
    try:
        memory.begin()
        if cold:
            found = first_call(candidate, clock)
        else:
            found, timing.host = sample(candidate, clock)
    except Exception as error:  # a baseline may fail in any manner, and the others' times are still wanted
        timing.error = error
        return None
    peak = memory.read()
    if peak is not None:
        timing.peak_memory = max(peak, timing.peak_memory or 0)
    return found


@contextmanager
def quiet() -> Iterator[None]:
    """Within the block no garbage is collected and no gradients are kept: neither is work of a candidate."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        with torch.no_grad():
            yield
    finally:
        if enabled:
            gc.enable()
