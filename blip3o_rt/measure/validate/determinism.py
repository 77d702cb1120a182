"""Same seed, same image: twice, in a batch, in another order, replayed and run. Every bit is compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from blip3o_rt.graphs import GraphRunner
from blip3o_rt.measure.validate.bounds import equal_line
from blip3o_rt.measure.validate.line import Line
from blip3o_rt.measure.validate.subject import INSTRUCTION, PROMPT, SEED, Subject
from blip3o_rt.pipeline import Pipeline
from blip3o_rt.result import Result

OTHER_PROMPT = "a small yellow star beside a green square, both on a white background"
STEPS = 2
WINDOW = 6  # rows of an image in a pass
WHY = "every random number is a function of the seed and its place"


def determinism_lines(subject: Subject, dtypes: Sequence[str]) -> Iterator[Line | str]:
    """Sampled images (not greedy ones), and what the decoder made of them, against each other."""
    runner = GraphRunner.of(subject.device)
    if not runner.captures:
        yield "determinism: nothing is replayed on this device, so there are no graphs to compare"
    for dtype in dtypes:
        if subject.scope.large and dtype == "fp32":
            yield "determinism: a large model's in bf16 only"
            continue
        checkpoint = subject.ours(dtype)
        pipeline = Pipeline(checkpoint, max_batch=3, runner=runner)
        pipeline.warm_up()
        eager = Pipeline(checkpoint, max_batch=3, runner=GraphRunner(None)) if runner.captures else None
        steps = 1 if subject.scope.large else STEPS
        yield from _text_lines(pipeline, eager, dtype, steps) if subject.draws_from_text else ()
        if subject.config.ta_tok is not None and not subject.scope.large:
            yield from _edit_lines(pipeline, eager, subject, dtype, steps)


def _text_lines(pipeline: Pipeline, eager: Pipeline | None, dtype: str, steps: int) -> Iterator[Line]:
    """`eager`: the same model without graphs, where the other replays them."""
    both = pipeline.generate(PROMPT, n=2, seed=SEED, steps=steps)
    again = pipeline.generate(PROMPT, n=2, seed=SEED, steps=steps)
    yield _line("the same seed twice", dtype, both, 0, again, 0)
    alone = pipeline.generate(PROMPT, seed=SEED + 1, steps=steps, draft_window=1)
    windows = pipeline.generate(PROMPT, seed=SEED + 1, steps=steps, draft_window=WINDOW)
    yield _line("one token a pass and several", dtype, alone, 0, windows, 0)
    yield _line("alone and in a batch", dtype, both, 1, alone, 0)
    mixed = pipeline.generate([OTHER_PROMPT, PROMPT], seed=SEED, steps=steps)
    yield _line("after another prompt and alone", dtype, both, 0, mixed, 1)
    turned = pipeline.generate([PROMPT, OTHER_PROMPT], seed=SEED, steps=steps)
    yield _line("two prompts in either order", dtype, mixed, 0, turned, 1)
    if eager is not None:
        run = eager.generate(PROMPT, seed=SEED + 1, steps=steps)
        yield _line("replayed as graphs and run without", dtype, alone, 0, run, 0)


def _edit_lines(
    pipeline: Pipeline, eager: Pipeline | None, subject: Subject, dtype: str, steps: int
) -> Iterator[Line]:
    first, second = (pipeline.edit(INSTRUCTION, subject.image, seed=SEED, steps=steps) for _ in range(2))
    yield _line("edit: the same seed twice", dtype, first, 0, second, 0)
    if eager is not None:
        run = eager.edit(INSTRUCTION, subject.image, seed=SEED, steps=steps)
        yield _line("edit: replayed as graphs and run without", dtype, first, 0, run, 0)


def _line(name: str, dtype: str, first: Result, i: int, second: Result, j: int) -> Line:
    """Image i of one result against image j of another, and their plans."""
    found, expected = _bits(first, i), _bits(second, j)
    return equal_line("determinism", name, dtype, found, expected, why=WHY)


def _bits(result: Result, index: int) -> Tensor:
    """Tokens, hidden states and gray levels of an image as one vector of float64, which holds them all."""
    plan = result.plans[index]
    parts = [plan.token_ids, plan.hidden_states, torch.from_numpy(np.array(result[index]))]
    return torch.cat([part.flatten().cpu().double() for part in parts])
