"""Sleep and wake: the memory is given back, and what is drawn afterwards is what was drawn before."""

from __future__ import annotations

import weakref
from pathlib import Path

import numpy as np
import pytest

from blip3o_rt.checkpoint.load import load_checkpoint
from blip3o_rt.errors import AsleepError, ParameterError
from blip3o_rt.graphs import GraphRunner
from blip3o_rt.measure.random_checkpoint import preset, write_random_checkpoint
from blip3o_rt.pipeline import Pipeline
from tests.captured_graph import CapturedGraphs
from tests.rl.test_update_weights import PROMPT, STEPS, drawn, moved, published, same


def test_it_wakes_as_it_was() -> None:
    pipeline = Pipeline.load(device="cpu", dtype="fp32", max_batch=3)
    before, checksum = drawn(pipeline), pipeline.weights_checksum()
    held = [weakref.ref(pipeline._planner.engine.cache.keys[0]), weakref.ref(pipeline._renderer._dit)]
    pipeline.sleep()
    assert [reference() for reference in held] == [None, None]
    assert pipeline.asleep
    for request in (
        lambda: pipeline.generate(PROMPT),
        lambda: pipeline.plan(PROMPT),
        lambda: pipeline.rollout(PROMPT),
        lambda: pipeline.edit(PROMPT, "a.png"),
    ):
        with pytest.raises(AsleepError, match="wake"):
            request()
    assert pipeline.weights_checksum() == checksum
    pipeline.sleep()
    pipeline.wake()
    pipeline.wake()
    assert not pipeline.asleep
    assert pipeline.max_batch == 3
    assert same(drawn(pipeline), before)


def test_weights_that_are_updated_while_it_sleeps() -> None:
    pipeline, other = (Pipeline.load(device="cpu", dtype="bf16") for _ in range(2))
    new = moved(published())
    other.update_weights(new)
    pipeline.sleep()
    assert pipeline.update_weights(new) == 1
    pipeline.wake()
    assert pipeline.weights_version == 1
    assert pipeline.weights_checksum() == other.weights_checksum()
    assert same(drawn(pipeline), drawn(other))


def test_what_was_captured_is_captured_again(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "tiny", preset("tiny"), seed=1)
    checkpoint = load_checkpoint(tmp_path / "tiny", device="cpu")
    pipeline = Pipeline(checkpoint, max_batch=1, runner=GraphRunner(CapturedGraphs()))
    pipeline.warm_up()
    before = pipeline.generate(PROMPT, seed=3, steps=STEPS)
    pipeline.sleep()
    pipeline.wake()
    result = pipeline.generate(PROMPT, seed=3, steps=STEPS)
    assert np.array_equal(np.asarray(result[0]), np.asarray(before[0]))
    assert not result.report.not_captured


def test_it_does_not_fall_asleep_within_a_request() -> None:
    pipeline = Pipeline.load(device="cpu", dtype="fp32")

    def callback(progress: object) -> None:
        with pytest.raises(ParameterError, match="within a request"):
            pipeline.sleep()

    pipeline.generate(PROMPT, steps=STEPS, callback=callback)
    assert not pipeline.asleep
