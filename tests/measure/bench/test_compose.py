"""Whole images from their stages."""

from __future__ import annotations

import pytest

from blip3o_rt.measure.bench import compose
from blip3o_rt.measure.records import BenchRecord, Line

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
LINES = [Line(name=n, who=w, batch=b, median=m) for (n, w, b), m in MEDIANS.items()]


def recipe(who: str, batch: int = 1) -> list[compose.Part]:
    return compose.recipes(729, 30, batch, ["published", "published-compiled"])[who]


def test_ours() -> None:
    parts = recipe("ours")
    assert compose.composed(parts, LINES) == pytest.approx(1 + 72.9 + 0.5 + 0.25 + 0.75 + 480 + 30)
    assert "729 x ar.token (ours)" in compose.note(parts)
    assert "30 x dit.step (ours)" in compose.note(parts)


def test_the_published_code_runs_the_connector_at_every_step_and_reads_twice() -> None:
    parts = recipe("published")
    assert compose.composed(parts, LINES) == pytest.approx(2 + 182.25 + 8 + 15 + 600 + 40)


def test_a_batch_shares_its_tokens_and_nothing_else() -> None:
    batched = [*LINES, Line(name="ar.token", batch=4, median=0.15)]
    parts = recipe("ours", batch=4)
    each = 0.25 + 0.75 + 480 + 30
    assert compose.composed(parts, batched) == pytest.approx(1 + 0.15 * 729 + 0.5 + 4 * each)


def test_a_compiled_image_is_made_of_compiled_stages() -> None:
    parts = recipe("published-compiled")
    compiled = {part.line for part in parts if part.who == "published-compiled"}
    assert compiled == {"ar.token", "dit.step", "vae.decode"}
    assert compose.composed(parts, LINES) is None


@pytest.mark.parametrize("missing", ["ar.token", "dit.step"])
def test_nothing_is_guessed(missing: str) -> None:
    left = [line for line in LINES if line.name != missing]
    assert compose.composed(recipe("ours"), left) is None
    failed = [*left, Line(name=missing)]
    assert compose.composed(recipe("ours"), failed) is None


def test_a_breakdown_has_those_whose_stages_were_all_timed() -> None:
    record = BenchRecord(model={"tokens_per_image": 729, "steps": 30})
    found = compose.breakdown(record, LINES, ["published", "published-compiled"])
    assert list(found) == ["ours", "published"]
    assert found["ours"]["ar.token"] == pytest.approx(729 * 0.1)
    assert found["published"]["connector"] == pytest.approx(30 * 0.5)
    assert compose.breakdown(BenchRecord(), LINES, ["published"]) == {}
