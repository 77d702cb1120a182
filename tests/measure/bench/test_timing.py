"""Statistics, and races: turns, budgets, failures and interruptions."""

from __future__ import annotations

import gc
from collections.abc import Callable

import numpy as np
import pytest
import torch

from blip3o_rt.measure.bench import timing
from blip3o_rt.measure.bench.memory import PeakMemory
from blip3o_rt.measure.bench.samples import median, percentile, summary
from blip3o_rt.measure.bench.timing import Contender, Plan, Timing, quiet, race

CPU = torch.device("cpu")


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 10])
def test_statistics_are_numpys(count: int) -> None:
    samples = list(np.random.default_rng(count).exponential(size=count))
    assert median(samples) == pytest.approx(np.median(samples))
    for fraction in (0.0, 0.5, 0.9, 1.0):
        assert percentile(samples, fraction) == pytest.approx(np.quantile(samples, fraction))
    found = summary(samples)
    assert found == {
        "median": median(samples),
        "p90": percentile(samples, 0.9),
        "min": min(samples),
        "n": count,
    }


def test_no_samples_have_no_statistics() -> None:
    assert summary([]) == {"median": None, "p90": None, "min": None, "n": 0}


class Diary:
    """Contenders that write down when they are called."""

    def __init__(self) -> None:
        self.entries: list[str] = []

    def contender(self, who: str, call: Callable[[], object] = lambda: None) -> Contender:
        def noted() -> None:
            self.entries.append(who)
            call()

        return Contender(who, noted, prepare=lambda: self.entries.append(f"prepare {who}"))


def run(contenders: list[Contender], runs: int, seconds: float = 60.0) -> list[Timing]:
    timings = [Timing() for _ in contenders]
    race(contenders, timings, CPU, Plan(runs, seconds))
    return timings


def test_contenders_are_cold_once_and_then_take_turns() -> None:
    diary = Diary()
    timings = run([diary.contender("a"), diary.contender("b")], runs=3)
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


def test_a_spent_budget_ends_after_the_first_round(clock: Clock) -> None:
    (found,) = run([Contender("a", clock.taking(1.0))], 50, seconds=0.0)
    assert (found.cold, found.samples) == (1.0, [1.0])


def test_no_round_is_begun_that_would_pass_the_budget(clock: Clock) -> None:
    """Ten seconds hold two cold calls of one and two seconds, and two rounds of three."""
    short, long = run(
        [Contender("a", clock.taking(1.0)), Contender("b", clock.taking(2.0))], 50, seconds=10.0
    )
    assert (short.samples, long.samples) == ([1.0] * 2, [2.0] * 2)


def test_preparation_is_not_timed(clock: Clock) -> None:
    (found,) = run([Contender("a", clock.taking(1.0), prepare=clock.taking(5.0))], runs=2)
    assert found.samples == [1.0, 1.0]


def test_one_that_fails_keeps_its_error_and_the_others_go_on() -> None:
    calls = iter(range(100))

    def fails_late() -> None:
        if next(calls) == 2:
            raise ValueError("no more")

    late, never, sound = run(
        [Contender("late", fails_late), Contender("never", lambda: 1 / 0), Contender("sound", lambda: None)],
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
    contenders = [Contender("a", lambda: None), Contender("b", interrupted)]
    with pytest.raises(KeyboardInterrupt):
        race(contenders, timings, CPU, Plan(10, 60.0))
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
    del_me = torch.ones(size, dtype=torch.uint8)
    del del_me
    peak = memory.read()
    memory.begin()
    after = memory.read()
    assert peak is not None
    assert after is not None
    assert peak >= before + size * 3 // 4  # the allocator may have had some of it
    assert after < peak
