"""What the scheduler does next: batches, turns, fairness, priorities, cancellation, and one end each."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from blip3o_rt.serve.messages import Accepted, Event, Failed, Finished, Partial, Progress, Started, Submit
from blip3o_rt.serve.scheduler import AGING_SECONDS, STEPS_PER_PASS, Scheduler
from tests.serve.fakes import TOKENS, FakeStages, fake_image

STEPS = 4


class Run:
    """A scheduler on fakes with a clock of its own."""

    def __init__(self, max_batch: int = 2, images_per_step: int = 1, joins_underway: bool = True) -> None:
        self.stages = FakeStages(max_batch, images_per_step, joins_underway)
        self.events, self.now = list[Event](), 0.0
        self.scheduler = Scheduler(self.stages, self.events.append, clock=lambda: self.now)

    def submit(self, id: str, prompt: str = "a circle", n: int = 1, **options: Any) -> None:
        options.setdefault("diffusion", {"steps": STEPS})
        self.scheduler.submit(Submit(id, prompt, seeds=tuple((i, 10 + i) for i in range(n)), **options))

    def all(self) -> None:
        for _ in range(10_000):
            if not self.scheduler.busy:
                return
            self.scheduler.turn()
        raise AssertionError("never done")

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def finished(self) -> list[str]:
        return [event.id for event in self.of(Finished)]

    @property
    def joined(self) -> list[str]:
        return [line.split()[1] for line in self.stages.log if line.startswith("join")]


def test_images_are_those_of_prompt_and_seed_and_every_one_comes_once() -> None:
    run = Run()
    run.submit("a", n=3)
    run.submit("b", "a square", n=2)
    run.all()
    found = {(event.id, event.index): event.image.samples for event in run.of(Finished)}
    assert len(run.of(Finished)) == 5
    for id, prompt, n in (("a", "a circle", 3), ("b", "a square", 2)):
        for index in range(n):
            assert found[id, index] == fake_image(prompt, 10 + index, STEPS)
    assert not run.stages.batch


def test_steps_of_one_image_stand_between_tokens_of_others() -> None:
    run = Run(max_batch=1)
    run.submit("a", diffusion={"steps": 100})
    run.submit("b")
    for _ in range(TOKENS + 3 * STEPS_PER_PASS):
        run.scheduler.turn()
    assert run.stages.batch[0].drawn == 3  # b draws tokens
    steps = [line for line in run.stages.log if line.startswith("step a")]
    assert len(steps) == 3 * STEPS_PER_PASS + 1  # while a is denoised


def test_images_are_denoised_one_after_the_other_and_the_first_is_sent_before_the_last_is_begun() -> None:
    run = Run(max_batch=4)
    run.submit("a", n=4)
    run.all()
    steps = [line.split()[2] for line in run.stages.log if line.startswith("step")]
    assert steps == [str(10 + image) for image in range(4) for _ in range(STEPS)]


def test_images_share_steps_as_they_come_and_leave_as_they_finish() -> None:
    run = Run(max_batch=4, images_per_step=3)
    for number, steps in enumerate((2, 5, 3, 4, 1)):
        run.submit(f"r{number}", diffusion={"steps": steps}, partial_images=1)
    run.all()
    assert run.finished == ["r0", "r2", "r1", "r3", "r4"]
    for number, steps in enumerate((2, 5, 3, 4, 1)):
        made = [line.split()[3] for line in run.stages.log if line.startswith(f"step r{number} ")]
        assert made == [str(step + 1) for step in range(steps)]
    assert max(run.stages.shared) == 3
    assert sum(run.stages.shared) == 2 + 5 + 3 + 4 + 1
    assert {event.id for event in run.of(Partial)} == {"r0", "r1", "r2", "r3"}
    assert not run.scheduler.running


def test_images_that_join_none_underway_go_in_groups() -> None:
    run = Run(max_batch=8, images_per_step=4, joins_underway=False)
    run.submit("first", diffusion={"steps": 90})
    while not run.stages.shared:
        run.scheduler.turn()
    run.submit("rest", n=6, diffusion={"steps": 3})
    run.all()
    assert run.finished == ["first", *6 * ["rest"]]
    assert run.stages.shared == [1] * 90 + [4] * 3 + [2] * 3


def test_the_first_image_after_a_lull_waits_for_no_group() -> None:
    run = Run(max_batch=8, images_per_step=4, joins_underway=False)
    for lull in ("one", "two"):
        run.submit(f"never {lull}", "never")
        run.submit(lull, n=5)
        before = dict(run.scheduler.batch_sizes)
        while lull not in run.finished:
            run.scheduler.turn()
            drawn = run.scheduler.batch_sizes - Counter(before)
            assert set(drawn) <= {1}  # no token of another before the first image is finished
        run.all()
        assert run.finished.count(lull) == 5
        assert [event.id for event in run.of(Failed)].count(f"never {lull}") == 1
        assert (
            run.stages.shared == [1] + [1] * STEPS + [4] * STEPS
        )  # the one that failed, the first, the rest
        run.stages.shared.clear()


@pytest.mark.parametrize(("images_per_step", "joins_underway"), [(1, False), (4, True)])
def test_where_no_group_holds_the_first_image_up_the_others_are_drawn_beside_it(
    images_per_step: int, joins_underway: bool
) -> None:
    run = Run(max_batch=4, images_per_step=images_per_step, joins_underway=joins_underway)
    run.submit("a", n=4)
    run.all()
    assert run.scheduler.batch_sizes[4] == TOKENS


def test_a_step_that_fails_is_made_one_by_one_and_fails_those_that_fail_alone() -> None:
    run = Run(max_batch=4, images_per_step=4)
    for prompt in ("a circle", "alone", "never", "a square"):
        run.submit(prompt, prompt)
    run.all()
    assert sorted(run.finished) == ["a circle", "a square", "alone"]
    assert [event.id for event in run.of(Failed)] == ["never"]
    assert run.stages.log.count("close never 10") == 1


def test_a_step_that_some_made_before_it_failed_is_not_made_twice() -> None:
    run = Run(max_batch=4, images_per_step=4)
    for prompt in ("a circle", "second alone", "a second never", "a square"):
        run.submit(prompt, prompt, diffusion={"steps": 3}, partial_images=2)
    run.all()
    assert sorted(run.finished) == ["a circle", "a square", "second alone"]
    for prompt in run.finished:
        made = [line.split()[-1] for line in run.stages.log if line.startswith(f"step {prompt} ")]
        assert made == ["1", "2", "3"]
        assert [event.id for event in run.of(Partial)].count(prompt) == 2


def test_clients_take_turns_whatever_one_of_them_asks_for() -> None:
    run = Run(max_batch=1)
    run.submit("many", n=6, client="greedy")
    run.scheduler.turn()
    for number in range(3):
        run.submit(f"one{number}", client="modest")
    run.all()
    assert run.joined[:6] == ["many", "one0", "many", "one1", "many", "one2"]


def test_a_client_that_comes_back_has_not_saved_up() -> None:
    run = Run(max_batch=1)
    run.submit("early", client="rare")
    run.all()
    run.submit("steady", n=8, client="steady")
    for _ in range(40):
        run.scheduler.turn()
    run.submit("back", n=4, client="rare")
    run.all()
    after = run.joined[run.joined.index("back") :]
    assert after[:4].count("back") == 2


def test_priorities_come_first_and_waiting_raises_them() -> None:
    run = Run(max_batch=1)
    run.submit("first")
    run.scheduler.turn()
    run.submit("usual")
    run.submit("background", priority=-1)
    run.submit("urgent", priority=1)
    run.all()
    assert run.joined == ["first", "urgent", "usual", "background"]
    run = Run(max_batch=1)
    run.submit("first")
    run.scheduler.turn()
    run.submit("background", priority=-1)
    run.now = 2 * AGING_SECONDS
    run.submit("usual")
    run.all()
    assert run.joined == ["first", "background", "usual"]


def test_cancelling_takes_a_request_out_of_every_place() -> None:
    for turns in range(1, TOKENS + STEPS):
        run = Run()
        run.submit("gone", n=3)
        run.submit("stays")
        for _ in range(turns):
            run.scheduler.turn()
        run.scheduler.cancel("gone")
        before = run.finished.count("gone")
        run.all()
        assert run.finished.count("gone") == before
        assert "stays" in run.finished
        assert not run.stages.batch
        run.scheduler.cancel("gone")  # again, for nothing


def test_a_failure_ends_its_request_and_no_other() -> None:
    for word, kind in (
        ("bug", "GenerationError"),
        ("nan", "GenerationError"),
        ("memory", "InsufficientMemoryError"),
        ("unread", "GenerationError"),
        (" ", "PromptError"),
    ):
        run = Run(max_batch=4)
        run.submit("well")
        run.submit("ill", word, n=3)
        run.submit("fine")
        run.all()
        assert [(event.id, event.kind) for event in run.of(Failed)] == [("ill", kind)]
        assert sorted(run.finished) == ["fine", "well"]
        assert not run.stages.batch


def test_tokens_do_not_run_far_ahead_of_denoising() -> None:
    run = Run(max_batch=2)
    run.submit("a", n=20, diffusion={"steps": 500})
    for _ in range(300):
        run.scheduler.turn()
    assert len(run.joined) == 4


def test_previews_are_spread_over_the_steps_and_progress_is_told() -> None:
    run = Run()
    run.submit("a", partial_images=3, progress=True, diffusion={"steps": 8})
    run.all()
    assert [(event.number, event.image.samples[0]) for event in run.of(Partial)] == [(0, 2), (1, 4), (2, 6)]
    told = [(event.stage, event.done) for event in run.of(Progress)]
    assert ("tokens", TOKENS) in told
    assert ("denoise", 8) in told
    run = Run()
    run.submit("short", partial_images=3, diffusion={"steps": 1})
    run.submit("none")
    run.all()
    assert not run.of(Partial)
    assert not run.of(Progress)


def test_order_of_events_and_what_is_said_of_an_image() -> None:
    run = Run()
    run.submit("a")
    run.all()
    assert [type(event) for event in run.events] == [Accepted, Started, Finished]
    finished = run.of(Finished)[0]
    assert set(finished.seconds) == {"reference", "tokens", "denoise", "decode"}
    assert finished.tokens_per_pass == 1.0
    assert run.scheduler.batch_sizes == Counter({1: TOKENS})
