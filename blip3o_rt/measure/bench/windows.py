"""What several tokens a pass bring to a checkpoint: tokens a pass by window, and a pass by its rows."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from blip3o_rt.measure.tables import Table, formatted
from blip3o_rt.measure.units import time_text
from blip3o_rt.params import SamplingParams, check_draft_window
from blip3o_rt.pipeline import Pipeline

ROWS = (1, 2, 4, 8, 16)
PASSES = 4  # that are timed at a time, after one that is not
COMPUTED = "Times of an image at so many tokens a pass are computed from the pass, not measured."
ASSUMED = (1.5, 2.0, 3.0)  # tokens a pass, for a checkpoint whose own are not measured


@dataclass(frozen=True)
class WindowTime:
    """Images drawn with one draft_window: tokens a pass, and seconds of an image's tokens (the median)."""

    window: int | str
    tokens_per_pass: float
    seconds: float
    speedup: float


@dataclass(frozen=True)
class PassTime:
    """Seconds of a pass of so many rows of one image (the median), and of an image at ASSUMED tokens a
    pass."""

    rows: int
    seconds: float
    relative: float
    image_seconds: dict[str, float]


def window_times(
    pipeline: Pipeline,
    prompts: Sequence[str],
    windows: Sequence[int | str],
    sampling: SamplingParams,
    rounds: int,
    progress: Callable[[str], None],
) -> list[WindowTime]:
    """Draw the tokens of every prompt with every window, the windows by turns, `rounds` times.

    Raises:
        AssertionError: Tokens or hidden states depend on the window.
    """
    planner = pipeline._planner
    seconds: dict[int | str, list[float]] = {window: [] for window in windows}
    passes = dict.fromkeys(windows, 0)
    for number in range(rounds):
        for prompt in prompts:
            first = None
            for window in windows:
                progress(f"round {number + 1} of {rounds}: window {window}")
                sample = replace(sampling, seed=sampling.seed + number)
                (asked,) = planner.requests(prompt, [sample], draft_window=check_draft_window(window))
                begun = _now(pipeline)
                (plan,) = planner.engine.generate([asked.tokens])
                seconds[window].append(_now(pipeline) - begun)
                passes[window] += plan.passes
                first = first or plan
                assert torch.equal(plan.token_ids, first.token_ids), f"window {window}: other tokens"
                assert torch.equal(plan.hidden_states, first.hidden_states), f"window {window}: other bits"
    tokens = planner.engine.image_tokens.tokens_per_image * len(prompts) * rounds
    medians = {window: statistics.median(times) for window, times in seconds.items()}
    return [
        WindowTime(window, tokens / passes[window], medians[window], medians[windows[0]] / medians[window])
        for window in windows
    ]


def pass_times(pipeline: Pipeline, prompt: str, rounds: int) -> list[PassTime]:
    """Time a pass of every number of rows of one image, right behind its prompt, by turns."""
    seconds: dict[int, list[float]] = {rows: [] for rows in ROWS}
    for _ in range(rounds):
        for rows in ROWS:
            seconds[rows] += _passes(pipeline, prompt, rows)
    medians = {rows: statistics.median(times) for rows, times in seconds.items()}
    tokens = pipeline.config.image_tokens.tokens_per_image
    return [
        PassTime(
            rows,
            found,
            found / medians[1],
            {f"{per_pass:g}": found * tokens / per_pass for per_pass in ASSUMED if per_pass <= rows},
        )
        for rows, found in medians.items()
    ]


def as_dict(windows: Sequence[WindowTime], passes: Sequence[PassTime]) -> dict[str, object]:
    """Both tables, ready for JSON; times are seconds."""
    return {"windows": [asdict(window) for window in windows], "passes": [asdict(found) for found in passes]}


def as_text(record: Mapping[str, Any]) -> str:
    """Both tables of what `as_dict` gave."""
    found = [formatted(table, "simple") for table in tables(record)]
    return "\n\n".join([*filter(None, found), COMPUTED])


def tables(record: Mapping[str, Any]) -> tuple[Table, Table]:
    """Images by window, and a pass by its rows; a table without rows was not measured."""
    windows = [
        [
            str(found["window"]),
            f"{found['tokens_per_pass']:.2f}",
            time_text(found["seconds"]),
            f"{found['speedup']:.2f}x",
        ]
        for found in record["windows"]
    ]
    assumed = [f"{per_pass:g}" for per_pass in ASSUMED]
    passes = [
        [
            str(found["rows"]),
            time_text(found["seconds"]),
            f"{found['relative']:.2f}x",
            *(time_text(found["image_seconds"].get(per_pass)) for per_pass in assumed),
        ]
        for found in record["passes"]
    ]
    headers = [f"an image at {per_pass} tokens a pass" for per_pass in assumed]
    return (
        (["window", "tokens a pass", "an image's tokens", "speed"], windows),
        (["rows of a pass", "a pass", "of one row", *headers], passes),
    )


def _passes(pipeline: Pipeline, prompt: str, rows: int) -> Iterator[float]:
    engine = pipeline._planner.engine
    (asked,) = pipeline._planner.requests(prompt, [SamplingParams()], draft_window=rows)
    request = engine.submit(asked.tokens)
    try:
        engine.step()
        for _ in range(PASSES):
            begun = _now(pipeline)
            if len(engine.step()) != rows:  # near its end an image has fewer
                return
            yield _now(pipeline) - begun
    finally:
        engine.cancel(request)


def _now(pipeline: Pipeline) -> float:
    if pipeline.device.type == "cuda":
        torch.cuda.synchronize(pipeline.device)
    return time.perf_counter()
