"""Several tokens a pass: whatever the windows, every image has the tokens and hidden states of one a pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from blip3o_rt import ops
from blip3o_rt.ar.draft_window import Agreement, PassTimes, Share, choose
from blip3o_rt.ar.engine import TokenEngine, TokenPlan, TokenPrompt
from blip3o_rt.params import MAX_DRAFT_WINDOW, SamplingParams
from tests.ar.oracle import image_tokens, oracle, runtime_weights, small_config

CONFIG = small_config()
TOKENS = image_tokens(CONFIG, tokens_per_image=25)
COUNT = TOKENS.tokens_per_image
WEIGHTS = {dtype: runtime_weights(CONFIG, oracle(CONFIG), dtype) for dtype in (torch.float32, torch.bfloat16)}
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5]
WINDOWS = [*range(1, MAX_DRAFT_WINDOW + 1), None]
SAMPLINGS = {
    "greedy": {"top_k": 1},
    "two tokens": {"top_k": 2, "temperature": 0.3},
    "filtered": {"top_k": 12, "top_p": 0.7, "temperature": 0.5},
    "unfiltered": {"top_k": 0, "top_p": 1.0, "temperature": 5.0},
    "whole vocabulary": {"top_k": 5, "temperature": 0.3, "image_tokens_only": False},
}


def make_engine(dtype: torch.dtype = torch.float32, page_size: int = 16, max_batch: int = 4) -> TokenEngine:
    return TokenEngine(
        CONFIG, TOKENS, WEIGHTS[dtype], max_batch=max_batch, max_prompt_tokens=12, page_size=page_size
    )


def make_prompts(window: int | None, n: int = 1, **sampling: Any) -> list[TokenPrompt]:
    samples = [SamplingParams(seed=11 + i, **sampling) for i in range(n)]
    return [TokenPrompt(PROMPT, sample, draft_window=window) for sample in samples]


def same(found: list[TokenPlan], expected: list[TokenPlan]) -> bool:
    return all(
        torch.equal(plan.token_ids, other.token_ids) and torch.equal(plan.hidden_states, other.hidden_states)
        for plan, other in zip(found, expected, strict=True)
    )


# What make test draws; every other sampling, dtype and size of page is exhaustive.
QUICK = {
    *((name, torch.float32, 16) for name in SAMPLINGS),
    ("filtered", torch.bfloat16, 64),
    ("two tokens", torch.bfloat16, 5),
}
DRAWN = [
    pytest.param(
        sampling,
        dtype,
        page_size,
        id=f"{name}-{short}-{page_size}",
        marks=() if (name, dtype, page_size) in QUICK else pytest.mark.exhaustive,
    )
    for name, sampling in SAMPLINGS.items()
    for short, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16}.items()
    for page_size in (16, 64, 5)
]


@pytest.mark.parametrize(("sampling", "dtype", "page_size"), DRAWN)
def test_the_image_of_one_token_a_pass(sampling: dict[str, Any], dtype: torch.dtype, page_size: int) -> None:
    engine = make_engine(dtype, page_size)
    expected = engine.generate(make_prompts(1, 2, **sampling))
    assert [plan.passes for plan in expected] == [COUNT, COUNT]
    told: list[int] = []
    for window in WINDOWS:
        found = engine.generate(make_prompts(window, 2, **sampling), told.append)
        assert same(found, expected), f"window {window}"
        assert told[-1] == 2 * COUNT


def test_guesses_that_are_right_save_passes() -> None:
    """A greedy decoder of random weights soon repeats itself, as the guesses do."""
    engine = make_engine()
    found = {window: engine.generate(make_prompts(window, top_k=1)) for window in (1, 2, 4, 8)}
    passes = {window: plan.passes for window, (plan,) in found.items()}
    assert passes[1] == COUNT
    assert passes[8] <= passes[4] <= passes[2] < passes[1]


def test_windows_of_a_batch_differ_and_nobody_notices() -> None:
    engine = make_engine(max_batch=3)
    prompts = [
        prompt
        for n, window in ((1, 8), (2, None), (3, 3), (1, 16), (2, 1))
        for prompt in make_prompts(window, n, top_k=1 + n, temperature=0.5)
    ]
    found = engine.generate(prompts)
    for plan, prompt in zip(found, prompts, strict=True):
        alone = make_engine().generate([dataclasses.replace(prompt, draft_window=1)])
        assert same([plan], alone)
    assert engine.cache.free_pages == engine.cache.num_pages


def test_a_full_batch_of_as_many_images_as_rows_draws_one_token_a_pass() -> None:
    engine = make_engine(max_batch=MAX_DRAFT_WINDOW)
    requests = [engine.submit(prompt) for prompt in make_prompts(8, MAX_DRAFT_WINDOW, top_k=2)]
    assert len(engine.step()) == MAX_DRAFT_WINDOW
    while engine.busy:
        assert len(engine.step()) <= MAX_DRAFT_WINDOW
    plans = [request.plan for request in requests if request.plan is not None]
    assert same(plans, make_engine().generate(make_prompts(1, MAX_DRAFT_WINDOW, top_k=2)))


def shifted(which: str) -> Callable[..., Tensor]:
    """advance_windows with one of its results one too large in every row but a window's first."""
    advance = ops.advance_windows

    def wrong(*arguments: Any, **options: Any) -> Tensor:
        given = dict(zip(advance.argument_names, arguments, strict=False))
        if which == "accepted":  # the first guess is taken for right
            for begin, end in given["cu_rows"].unfold(0, 2, 1).tolist():
                if end - begin > 1 and given["context_lens"][begin + 1] > 0:
                    slot = int(given["output_slots"][begin])
                    given["sampled_ids"][begin] = given["output_ids"][slot]
            return advance(*arguments, **options)
        found = advance(*arguments, **options)
        later = given["context_lens"] > 0
        later[given["cu_rows"][:-1].long().clamp(max=len(later) - 1)] = False
        given[which][later] += 1
        given["num_generated"].clamp_(max=COUNT)  # what the kernel itself refuses
        return found

    return wrong


@pytest.mark.parametrize("which", ["num_generated", "positions", "context_lens", "accepted"])
def test_an_off_by_one_is_seen(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the noise of a draw, of the rotation, of what attention masks, of how much is accepted."""
    sampling = {"top_k": 3, "temperature": 0.5}
    expected = make_engine().generate(make_prompts(1, 2, **sampling))
    monkeypatch.setattr(ops, "advance_windows", shifted(which))
    assert not same(make_engine().generate(make_prompts(6, 2, **sampling)), expected)


# How many rows


def test_a_chance_is_what_agreed_lately() -> None:
    agreement = Agreement()
    for _ in range(40):
        agreement.note(kept=1, offered=8)
    assert agreement.chance < 0.05
    for _ in range(40):
        agreement.note(kept=8, offered=8)
    assert agreement.chance > 0.95
    before = agreement.chance
    agreement.note(kept=1, offered=1)  # nothing was guessed
    assert agreement.chance == before


def test_a_new_image_expects_what_the_last_one_showed() -> None:
    engine = make_engine()
    chances = []  # at the beginning and at the end of each image
    for _ in range(2):
        (prompt,) = make_prompts(8, top_k=3, temperature=0.5)
        request = engine.submit(prompt)
        engine.step()
        chances.append(request.agreement.chance)
        while not request.done:
            engine.step()
        chances.append(request.agreement.chance)
    assert chances[0] == Agreement().chance != chances[1]
    assert chances[2] == pytest.approx(chances[1])


def times(**seconds: float) -> PassTimes:
    found = PassTimes()
    for rows, value in seconds.items():
        found.note(int(rows.removeprefix("r")), value)
    return found


def test_a_pass_costs_no_more_than_a_larger_one_nor_more_a_row_than_a_smaller_one() -> None:
    found = times(r1=1.0, r4=40.0, r8=2.0)
    assert found.estimate(4) == 2.0
    assert found.estimate(2) <= 2.0
    assert found.estimate(16) <= 4.0


def test_rows_go_where_they_gain_most() -> None:
    flat, steep = times(r1=1.0, r16=1.1), times(r1=1.0, r2=2.0, r16=16.0)
    sure, unsure = Share(0.95, 16), Share(0.2, 16)
    assert choose([sure], flat, 16) == [16]
    assert choose([sure], steep, 16) == [1]
    windows = choose([sure, unsure], flat, 16)
    assert windows[0] > windows[1] >= 1
    assert sum(windows) <= 16
    assert choose([Share(0.0, 16)], flat, 16) == [1]
    assert choose([sure, Share(0.95, 2)], flat, 16)[1] <= 2  # two rows are all it can use


def test_a_fixed_window_is_given_whatever_it_gains() -> None:
    steep = times(r1=1.0, r2=2.0, r16=16.0)
    assert choose([Share(0.0, 7, fixed=True)], steep, 16) == [7]
    assert choose([Share(0.0, 16, fixed=True)] * 4, steep, 16) == [4] * 4
    assert choose([Share(0.9, 16, fixed=True), Share(0.9, 16)], steep, 4) == [3, 1]
