"""Statistics, and races: turns, failures, interruptions, and the host off a device's path."""

from __future__ import annotations

import gc
import mmap
from collections.abc import Callable

import numpy as np
import pytest
import torch

from blip3o_rt.measure.bench import timing
from blip3o_rt.measure.bench.memory import PeakMemory
from blip3o_rt.measure.bench.timing import Candidate, Timing, quiet, race
from blip3o_rt.measure.records import Line, median, percentile

CPU = torch.device("cpu")


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 10])
def test_statistics_are_numpys(count: int) -> None:
    samples = list(np.random.default_rng(count).exponential(size=count))
    assert median(samples) == pytest.approx(np.median(samples))
    for fraction in (0.0, 0.5, 0.9, 1.0):
        assert percentile(samples, fraction) == pytest.approx(np.quantile(samples, fraction))
    found = Line(samples=tuple(samples))
    assert (found.median, found.p90) == (median(samples), percentile(samples, 0.9))
    assert (found.fastest, found.count) == (min(samples), count)


def test_no_samples_have_no_statistics() -> None:
    found = Line()
    assert (found.median, found.p90, found.fastest, found.count) == (None, None, None, 0)


class Diary:
    """Candidates that write down when they are called."""

    def __init__(self) -> None:
        self.entries: list[str] = []

    def candidate(self, who: str, call: Callable[[], object] = lambda: None) -> Candidate:
        def noted() -> None:
            self.entries.append(who)
            call()

        return Candidate(who, noted, prepare=lambda: self.entries.append(f"prepare {who}"))


def run(candidates: list[Candidate], runs: int) -> list[Timing]:
    timings = [Timing() for _ in candidates]
    race(candidates, timings, CPU, runs)
    return timings


def test_candidates_are_cold_once_and_then_take_turns() -> None:
    diary = Diary()
    timings = run([diary.candidate("a"), diary.candidate("b")], runs=3)
    assert [entry for entry in diary.entries if "prepare" not in entry] == list("abbaabba")
    assert diary.entries[::2] == [f"prepare {entry}" for entry in diary.entries[1::2]]
    for found in timings:
        assert found.cold is not None
        assert len(found.samples) == 3


class Clock:
    """Stands in for the machine's clock: time passes only where a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def taking(self, seconds: float) -> Callable[[], None]:
        """A call that takes so long."""

        def call() -> None:
            self.now += seconds

        return call


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(timing, "time", found)
    return found


def test_preparation_is_not_timed(clock: Clock) -> None:
    (found,) = run([Candidate("a", clock.taking(1.0), prepare=clock.taking(5.0))], runs=2)
    assert found.samples == [1.0, 1.0]


def test_one_that_fails_keeps_its_error_and_the_others_go_on() -> None:
    calls = iter(range(100))

    def fails_late() -> None:
        if next(calls) == 2:
            raise ValueError("no more")

    late, never, sound = run(
        [Candidate("late", fails_late), Candidate("never", lambda: 1 / 0), Candidate("sound", lambda: None)],
        4,
    )
    assert isinstance(late.error, ValueError)
    assert len(late.samples) == 1
    assert isinstance(never.error, ZeroDivisionError)
    assert (never.cold, never.samples) == (None, [])
    assert sound.error is None
    assert len(sound.samples) == 4


def test_an_interruption_leaves_what_was_timed() -> None:
    calls = iter(range(100))

    def interrupted() -> None:
        if next(calls) == 3:
            raise KeyboardInterrupt

    timings = [Timing(), Timing()]
    candidates = [Candidate("a", lambda: None), Candidate("b", interrupted)]
    with pytest.raises(KeyboardInterrupt):
        race(candidates, timings, CPU, 10)
    assert [len(found.samples) for found in timings] == [2, 2]
    assert gc.isenabled()


def test_quiet_collects_no_garbage_and_records_no_gradients() -> None:
    with quiet():
        assert not gc.isenabled()
        assert not torch.is_grad_enabled()
    assert gc.isenabled()
    assert torch.is_grad_enabled()


def test_peak_memory_sees_what_was_freed_again() -> None:
    memory, size = PeakMemory(CPU), 2**26
    memory.begin()
    before = memory.read()
    if before is None:
        pytest.skip("this system does not tell the peak of a while")
    with mmap.mmap(
        -1, size
    ) as held:  # of the system: an allocator may hand out memory that is resident already
        for page in range(0, size, mmap.PAGESIZE):
            held[page] = 1
    peak = memory.read()
    memory.begin()
    after = memory.read()
    assert peak is not None
    assert after is not None
    assert peak >= before + size * 3 // 4  # another thread may have freed some meanwhile
    assert after < peak


class FakeDevice:
    """A device that works off a queue beside a host, both with clocks that only a test moves."""

    def __init__(self) -> None:
        self.host_time = 0.0
        self.done = 0.0  # when the last of what is queued will be done

    def launch(self, host: float, device: float) -> None:
        """Queue work of so many seconds, which takes the host so many."""
        self.host_time += host
        self.done = max(self.done, self.host_time) + device

    def host(self) -> float:
        return self.host_time

    def synchronize(self) -> None:
        self.host_time = self.done = max(self.host_time, self.done)

    def sleep(self, seconds: float) -> None:
        self.launch(0.0, seconds)

    def mark(self) -> float:
        self.done = max(self.done, self.host_time)
        return self.done

    def between(self, first: float, last: float) -> float:
        self.synchronize()
        return last - first


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    found = FakeDevice()
    monkeypatch.setattr(timing, "device_clock", lambda _: found)
    return found


@pytest.mark.parametrize("queued", [1, 128])
@pytest.mark.parametrize("host", [0.0, 1e-4, 1e-3, 1e-2])
def test_the_host_is_not_on_the_devices_path(device: FakeDevice, host: float, queued: int) -> None:
    """A call of 1 ms is one of 1 ms, even where the host takes ten times as long to queue it."""
    candidate = Candidate("a", lambda: device.launch(host, 1e-3), queued=queued)
    (found,) = run([candidate], runs=5)
    assert found.samples == pytest.approx([1e-3] * 5)
    assert found.host == pytest.approx(host)


def test_the_host_is_part_of_an_eager_call(device: FakeDevice) -> None:
    (found,) = run([Candidate("a", lambda: device.launch(1e-2, 1e-3), eager=True)], runs=3)
    assert found.samples == pytest.approx([1.1e-2] * 3)


def test_every_sample_is_prepared(device: FakeDevice) -> None:
    """One that is taken again, because the device slept too short a while, too."""
    left = 0

    def prepare() -> None:
        nonlocal left
        left = 8

    def call() -> None:
        nonlocal left
        left -= 1
        assert left >= 0
        device.launch(1e-3, 1e-4)

    (found,) = run([Candidate("a", call, prepare, queued=8)], runs=3)
    assert found.error is None
    assert found.samples == pytest.approx([1e-4] * 3)
