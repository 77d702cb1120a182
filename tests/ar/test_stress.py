"""Many requests through a tiny pool: joining, leaving, failing, cancelled, and none notices another.

`make test` sends 150; a thousand of them are exhaustive.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections import Counter
from collections.abc import Sequence

import pytest
import torch

from blip3o_rt.ar.engine import Request, TokenEngine, TokenPlan, TokenPrompt
from blip3o_rt.graphs import GraphRunner
from blip3o_rt.params import SamplingParams
from tests.ar.oracle import image_tokens, oracle, runtime_weights, small_config

CONFIG = small_config(hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2, num_kv_heads=1)
TOKENS = image_tokens(CONFIG, tokens_per_image=6)
WEIGHTS = runtime_weights(CONFIG, oracle(CONFIG, seed=3))
MAX_IMAGES = 8
SHARED = [3, 1, 4, 1, 5, 9, 2, 6]
SAMPLINGS = [
    SamplingParams(seed=1),
    SamplingParams(seed=2, top_k=20, temperature=0.7),
    SamplingParams(seed=3, top_k=1),
    SamplingParams(seed=4, top_k=0, top_p=1.0, temperature=3.0),
    SamplingParams(seed=2**62 + 5, top_k=0, top_p=0.8, image_tokens_only=False),
    SamplingParams(seed=6, top_k=30, temperature=2.0, image_tokens_only=False),
]


def make_engine(
    max_batch: int, num_pages: int | None = None, runner: GraphRunner | None = None
) -> TokenEngine:
    return TokenEngine(
        CONFIG,
        TOKENS,
        WEIGHTS,
        max_batch=max_batch,
        max_prompt_tokens=16,
        page_size=2,
        num_pages=num_pages,
        prefill_chunk=4,
        runner=runner,
    )


def make_prompts() -> list[TokenPrompt]:
    """Prompts of every length to a page and past it, with and without a common beginning; features; NaN."""
    plain = [[7], [7, 8], [50, 3, 1], SHARED, [*SHARED, 9], [*SHARED, 8, 7, 7, 7], [*SHARED[:5], 2, 2, 2, 2]]
    sampling = SAMPLINGS[0]  # whose place another takes
    prompts = [TokenPrompt(ids, sampling) for ids in [*plain, [*SHARED, *SHARED]]]
    features = torch.randn(3, CONFIG.hidden_size, generator=torch.Generator().manual_seed(1))
    prompts.append(TokenPrompt([*SHARED, 1, 2, 3], sampling, features, range(4, 7)))
    broken = torch.full_like(features, float("nan"))
    prompts.append(TokenPrompt([*SHARED, 1, 2], sampling, broken, range(5, 8)))
    return prompts


class Traffic:
    """Requests at random from a seed, what each image is alone, and what must hold between any two steps."""

    def __init__(self, seed: int, engine: TokenEngine, windows: Sequence[int | None] = (1,)) -> None:
        self.engine, self.random, self.windows = engine, random.Random(seed), windows
        self.prompts = make_prompts()
        single = make_engine(max_batch=1)
        self.expected: dict[tuple[int, SamplingParams], TokenPlan] = {
            (index, params): single.generate([dataclasses.replace(prompt, sampling=params)])[0]
            for index, prompt in enumerate(self.prompts)
            for params in SAMPLINGS
        }
        self.requests: list[tuple[int, list[Request]]] = []  # the images of a prompt, and which it is
        self.numbers: dict[Request, int] = {}
        self.joined: dict[int, None] = {}  # numbers of images, in the order they were seen to run

    def submit(self) -> None:
        index = self.random.randrange(len(self.prompts))
        samples = self.random.choices(SAMPLINGS, k=self.random.randint(1, MAX_IMAGES))
        window = self.random.choice(self.windows)
        prompt = dataclasses.replace(self.prompts[index], draft_window=window)
        images = [self.engine.submit(dataclasses.replace(prompt, sampling=params)) for params in samples]
        self.numbers |= zip(images, itertools.count(len(self.numbers)), strict=False)
        self.requests.append((index, images))

    def cancel(self) -> None:
        recent = self.requests[-12:]
        for image in self.random.choice(recent)[1]:
            self.engine.cancel(image)

    def check_pages(self) -> None:
        """Every page is free or held by who runs; the page a token is written to has one holder."""
        engine, cache = self.engine, self.engine.cache
        holders = Counter(page for image in engine._running for page in image.sequence.page_table)
        assert cache.free_pages == cache.num_pages - len(holders)
        for image in engine._running:
            written = image.sequence.page_table[image.prompt_length // cache.page_size :]
            assert all(holders[page] == 1 for page in written)

    def check_order(self) -> None:
        """Who runs for the first time was submitted after all who ever ran."""
        running = [self.numbers[image] for image in self.engine._running]
        new = [number for number in running if number not in self.joined]
        last = next(reversed(self.joined), -1)
        assert [last, *new] == sorted([last, *new])
        self.joined.update(dict.fromkeys(new))

    def check_results(self) -> Counter[str]:
        found: Counter[str] = Counter()
        for index, image in ((index, image) for index, images in self.requests for image in images):
            assert image.done
            plan, expected = image.plan, self.expected[index, image.prompt.sampling]
            if plan is None:
                assert image.cancelled
                found["cancelled"] += 1
                continue
            if expected.error is not None:
                assert plan.error is not None
                found["failed"] += 1
                continue
            assert plan.error is None
            assert torch.equal(plan.token_ids, expected.token_ids)
            assert torch.equal(plan.hidden_states, expected.hidden_states)
            found["finished"] += 1
        return found


@pytest.mark.parametrize("count", [150, pytest.param(1000, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("windows", [[1], [None, *range(1, 17)]], ids=["a token a pass", "windows"])
def test_many_requests(windows: list[int | None], count: int) -> None:
    engine = make_engine(max_batch=7, num_pages=30)  # 11 pages are what the longest takes
    traffic = Traffic(2026, engine, windows)
    while len(traffic.requests) < count or engine.busy:
        if len(traffic.requests) < count and len(engine._waiting) < 40:
            for _ in range(traffic.random.choice([0, 0, 1, 1, 2, 5])):
                traffic.submit()
        if traffic.requests and traffic.random.random() < 0.12:
            traffic.cancel()
        was_busy = engine.busy
        assert bool(len(engine.step())) == was_busy  # no step without a token: it cannot wait for ever
        traffic.check_pages()
        traffic.check_order()
    assert len(traffic.requests) >= count
    assert engine.cache.free_pages == engine.cache.num_pages
    assert sorted(engine._free_slots) == list(range(engine.max_batch))
    found = traffic.check_results()
    assert min(found[kind] for kind in ("finished", "failed", "cancelled")) > count // 10
