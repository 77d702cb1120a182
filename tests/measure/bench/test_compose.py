"""Whole pictures from their stages, and the budget that decides whether they are drawn instead."""

from __future__ import annotations

import pytest

from blip3o_rt.measure.bench import compose
from blip3o_rt.measure.bench.budget import Budget
from blip3o_rt.measure.bench.lines import WEIGHTS

MEDIANS = {  # seconds, as on a small machine
    ("ar.prefill", "ours", 1): 1.0,
    ("ar.token", "ours", 1): 0.1,
    ("dit.tables", "ours", 1): 0.5,
    ("connector", "ours", 1): 0.25,
    ("dit.condition", "ours", 1): 0.75,
    ("dit.step", "ours", 1): 16.0,
    ("vae.decode", "ours", 1): 30.0,
    ("ar.prefill", "transformers", 1): 2.0,
    ("ar.token", "published", 1): 0.25,
    ("ar.second_pass", "published", 1): 8.0,
    ("connector", "published", 1): 0.5,
    ("dit.step", "diffusers", 1): 20.0,
    ("vae.decode", "diffusers", 1): 40.0,
}
LINES = [{"name": n, "who": w, "batch": b, "median": m} for (n, w, b), m in MEDIANS.items()]


def test_ours() -> None:
    parts = compose.parts_of_ours(729, 30, 1)
    assert compose.composed(parts, LINES) == pytest.approx(1 + 72.9 + 0.5 + 0.25 + 0.75 + 480 + 30)
    assert "729 x ar.token (ours)" in compose.in_words(parts)
    assert "30 x dit.step (ours)" in compose.in_words(parts)


def test_the_published_way_runs_the_connector_at_every_step_and_reads_twice() -> None:
    parts = compose.parts_of_published(729, 30, 1)
    assert compose.composed(parts, LINES) == pytest.approx(2 + 182.25 + 8 + 15 + 600 + 40)


def test_a_batch_shares_its_tokens_and_nothing_else() -> None:
    batched = [*LINES, {"name": "ar.token", "who": "ours", "batch": 4, "median": 0.15}]
    parts = compose.parts_of_ours(729, 30, 4)
    each = 0.25 + 0.75 + 480 + 30
    assert compose.composed(parts, batched) == pytest.approx(1 + 0.15 * 729 + 0.5 + 4 * each)


def test_a_compiled_way_is_made_of_compiled_stages() -> None:
    parts = compose.parts_of_published(729, 30, 1, "published-compiled")
    compiled = {part.line for part in parts if part.who == "published-compiled"}
    assert compiled == {"ar.token", "dit.step", "vae.decode"}
    assert compose.composed(parts, LINES) is None


@pytest.mark.parametrize("missing", ["ar.token", "dit.step"])
def test_nothing_is_guessed(missing: str) -> None:
    left = [line for line in LINES if line["name"] != missing]
    assert compose.composed(compose.parts_of_ours(729, 30, 1), left) is None
    failed = [*left, {"name": missing, "who": "ours", "batch": 1, "median": None}]
    assert compose.composed(compose.parts_of_ours(729, 30, 1), failed) is None


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_budget_is_shared_by_weight_and_what_is_left_over_goes_on() -> None:
    clock = Clock()
    names = ["ar.token", "dit.step", "vae.decode"]
    total = sum(WEIGHTS[name] for name in names)
    budget = Budget(600.0, names, clock)
    assert budget.take("ar.token") == pytest.approx(600 * WEIGHTS["ar.token"] / total)
    clock.now += 10.0  # it needed less
    rest = WEIGHTS["dit.step"] + WEIGHTS["vae.decode"]
    assert budget.take("dit.step") == pytest.approx(590 * WEIGHTS["dit.step"] / rest)
    clock.now += 1000.0  # it needed more
    assert budget.left == 0.0
    assert budget.take("vae.decode") == 0.0


def test_a_line_that_is_left_out_leaves_its_share() -> None:
    budget = Budget(600.0, ["ar.token", "image"], Clock())
    budget.drop("image")
    assert budget.take("ar.token") == pytest.approx(600.0)


def test_each_batch_size_has_a_share() -> None:
    budget = Budget(600.0, ["ar.token"] * 3, Clock())
    assert budget.take("ar.token") == pytest.approx(200.0)
