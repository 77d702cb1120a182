"""Who joins a batch when, what images share, and what a request that is cancelled or fails leaves behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from blip3o_rt import ops
from blip3o_rt.ar.engine import Request, TokenEngine, TokenPlan, TokenPrompt
from blip3o_rt.errors import ParameterError
from blip3o_rt.params import SamplingParams
from tests.ar.oracle import image_tokens, oracle, runtime_weights, small_config

CONFIG = small_config()
TOKENS = image_tokens(CONFIG)
COUNT = TOKENS.tokens_per_image
WEIGHTS = runtime_weights(CONFIG, oracle(CONFIG))
PAGE = 4
LONG = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3]


def make_engine(max_batch: int = 4, *, prompt: int = 28, num_pages: int | None = None) -> TokenEngine:
    return TokenEngine(
        CONFIG,
        TOKENS,
        WEIGHTS,
        max_batch=max_batch,
        max_prompt_tokens=prompt,
        page_size=PAGE,
        num_pages=num_pages,
        prefill_chunk=8,
    )


def make_prompt(ids: list[int], seed: int = 0) -> TokenPrompt:
    return TokenPrompt(ids, SamplingParams(seed=seed, top_k=20))


def submit(engine: TokenEngine, ids: list[int], n: int, seed: int = 0) -> list[Request]:
    """n images of a prompt."""
    return [engine.submit(make_prompt(ids, seed + i)) for i in range(n)]


def alone(prompt: TokenPrompt) -> TokenPlan:
    """An image in an engine of its own."""
    (plan,) = make_engine(1).generate([prompt])
    return plan


def finish(engine: TokenEngine) -> None:
    while engine.busy:
        assert len(engine.step())
    assert engine.cache.free_pages == engine.cache.num_pages


def assert_as_alone(*requests: Request) -> None:
    for request in requests:
        plan, expected = request.plan, alone(request.prompt)
        assert plan is not None
        assert plan.error is None
        assert torch.equal(plan.token_ids, expected.token_ids)
        assert torch.equal(plan.hidden_states, expected.hidden_states)


def pages_taken(engine: TokenEngine) -> int:
    return engine.cache.num_pages - engine.cache.free_pages


def prefilled(engine: TokenEngine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of positions of every prompt that the engine reads from now on."""
    read: list[int] = []
    prefill = engine.decoder.prefill

    def counted(embeddings: Tensor, *rest: object) -> Tensor:
        read.append(len(embeddings))
        return prefill(embeddings, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(engine.decoder, "prefill", counted)
    return read


def raising(error: BaseException) -> Callable[..., Tensor]:
    def run(*_: object, **__: object) -> Tensor:
        raise error

    return run


def test_requests_join_and_leave_between_tokens() -> None:
    engine = make_engine(3)
    requests: list[Request] = []
    for seed in range(6):
        requests += submit(engine, LONG[: 3 * seed + 1], 1 + seed % 2, seed)
        for _ in range(seed):
            engine.step()
    finish(engine)
    assert_as_alone(*requests)


def test_images_of_a_prompt_share_its_full_pages_and_read_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(4)
    read = prefilled(engine, monkeypatch)
    requests = submit(engine, LONG[:10], 3)
    engine.step()
    assert read == [10]
    whole = engine.cache.pages_for(10 + COUNT)
    assert pages_taken(engine) == whole + 2 * (whole - 10 // PAGE)
    finish(engine)
    assert_as_alone(*requests)


def test_a_prompt_that_runs_is_forked_by_a_later_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page that the prompt and the first image's own tokens lie in is copied, tokens and all."""
    engine = make_engine(4)
    read = prefilled(engine, monkeypatch)
    first = engine.submit(make_prompt(LONG[:10], seed=1))
    for _ in range(5):
        engine.step()
    second = engine.submit(make_prompt(LONG[:10], seed=2))
    finish(engine)
    assert read == [10]
    assert_as_alone(first, second)


def test_a_common_beginning_is_shared_in_whole_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(4)
    read = prefilled(engine, monkeypatch)
    requests = [
        engine.submit(make_prompt(ids))
        for ids in (LONG, [*LONG[:17], 80], [*LONG[:16]], [*LONG[:9], 80], [*LONG[:7], 80])
    ]
    engine.step()
    assert read == [18, 2, 8, 2]  # the last position of each is read, and the fifth waits for a row
    finish(engine)
    assert read == [18, 2, 8, 2, 8]
    assert_as_alone(*requests)


@pytest.mark.parametrize("start", [0, 4, 8])
def test_features_are_shared_only_with_the_same_features(start: int, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(4)
    read = prefilled(engine, monkeypatch)
    plain = make_prompt(LONG)
    features = torch.randn(3, CONFIG.hidden_size, generator=torch.Generator().manual_seed(1))
    edit = dataclasses.replace(plain, features=features, feature_positions=range(start, start + 3))
    moved = dataclasses.replace(edit, feature_positions=range(start + 1, start + 4))
    requests = [engine.submit(prompt) for prompt in (plain, edit, moved, edit)]
    engine.step()
    behind = start // 8 * 8
    assert read == [18, 18 - behind, 18 - behind]
    finish(engine)
    assert_as_alone(*requests)


def test_who_waits_joins_when_the_pages_are_there() -> None:
    pages = make_engine(1).cache.pages_for(4 + COUNT)
    engine = make_engine(4, num_pages=2 * pages + 2)
    requests = [engine.submit(make_prompt([index] * 4)) for index in range(3)]
    for _ in range(COUNT):
        assert len(engine.step()) == 2
    assert [request.done for request in requests] == [True, True, False]
    assert pages_taken(engine) == 0
    assert len(engine.step()) == 1
    finish(engine)
    assert_as_alone(*requests)


def test_nobody_overtakes_a_large_request_at_the_head() -> None:
    small, large = [7] * 4, LONG + LONG[:10]
    engine = make_engine(4, num_pages=make_engine(1).cache.pages_for(28 + COUNT))
    running = engine.submit(make_prompt(small))
    engine.step()
    waiting = submit(engine, large, 2)
    late = engine.submit(make_prompt(small, seed=9))  # there is room for this one, and it has to wait
    while not running.done:
        assert len(engine.step()) == 1
    assert [image.num_generated for image in waiting] == [0, 0]
    while not all(image.done for image in waiting):
        engine.step()
        assert late.num_generated == 0
    finish(engine)
    assert_as_alone(running, *waiting, late)


def test_more_images_than_rows_take_turns() -> None:
    engine = make_engine(3)
    requests = [*submit(engine, LONG, 8), engine.submit(make_prompt(LONG[:5]))]
    finish(engine)
    assert_as_alone(*requests)


@pytest.mark.parametrize("steps", [0, 1, 5, COUNT, COUNT + 1, 2 * COUNT])
def test_cancelling_in_every_state(steps: int) -> None:
    """Images that wait, that run beside those that wait or are finished, and that are done."""
    engine = make_engine(3)
    before = engine.submit(make_prompt(LONG[:6], seed=1))
    requests = submit(engine, LONG, 4, seed=2)
    after = engine.submit(make_prompt(LONG, seed=3))
    for _ in range(steps):
        engine.step()
    finished = [request for request in requests if request.done]
    for request in [*requests, *requests]:
        engine.cancel(request)
    assert all(request.done for request in requests)
    finish(engine)
    assert [request for request in requests if not request.cancelled] == finished
    assert [request for request in requests if request.plan is not None] == finished
    assert_as_alone(before, after, *finished)


def test_cancelling_who_read_the_prompt_leaves_who_forked_it() -> None:
    engine = make_engine(2)
    first = engine.submit(make_prompt(LONG, seed=1))
    second = engine.submit(make_prompt(LONG, seed=2))
    assert len(engine.step()) == 2
    engine.cancel(first)
    assert len(engine.step()) == 1
    third = engine.submit(make_prompt([7] * 18, seed=3))  # takes the pages that came back
    finish(engine)
    assert_as_alone(second, third)


def test_an_image_that_fails_midway_fails_alone() -> None:
    """Its pages hold NaN when the next image gets them, which must not see that."""
    engine = make_engine(2, num_pages=2 * make_engine(1).cache.pages_for(18 + COUNT))
    broken, healthy = engine.submit(make_prompt(LONG, seed=1)), engine.submit(make_prompt(LONG[::-1], seed=2))
    for _ in range(3):
        engine.step()
    engine.cache.values[0][broken.sequence.page_table[0]] = float("nan")
    late = [engine.submit(make_prompt(LONG, seed=seed)) for seed in (3, 4)]
    finish(engine)
    plan = broken.plan
    assert plan is not None
    assert "not finite" in str(plan.error)
    assert plan.token_ids[:3].tolist() == alone(broken.prompt).token_ids[:3].tolist()
    assert_as_alone(healthy, *late)


def test_a_prompt_that_cannot_be_read_ends_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(4)
    first = engine.submit(make_prompt(LONG[:6], seed=1))
    engine.step()
    broken = engine.submit(make_prompt(LONG, seed=2))
    last = engine.submit(make_prompt(LONG[:9], seed=3))
    with monkeypatch.context() as patch:
        patch.setattr(engine.decoder, "prefill", raising(RuntimeError("out of memory")))
        with pytest.raises(RuntimeError, match="out of memory"):
            engine.step()
    assert broken.cancelled
    finish(engine)
    assert_as_alone(first, last)


@pytest.mark.parametrize("op", ["sample_tokens", "decode_attention", "row_linear_add"])
def test_a_step_that_is_interrupted_can_be_taken_again(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(4)
    requests = [engine.submit(make_prompt(LONG[:length], seed=length)) for length in (5, 10)]
    for _ in range(4):
        engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(ops, op, raising(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    finish(engine)
    assert_as_alone(*requests)


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_a_finished_image_that_could_not_be_collected_is_collected_by_the_next_step(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(3)
    first, second = submit(engine, LONG[:6], 2, seed=1)
    engine.step()
    late = engine.submit(make_prompt(LONG, seed=3))
    for _ in range(COUNT - 2):
        engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_plan", raising(error))
        with pytest.raises(type(error)):
            engine.step()
    assert not first.done
    assert len(engine.step()) == 1
    assert first.done
    assert second.done
    finish(engine)
    assert_as_alone(first, second, late)


@pytest.mark.parametrize("cancel", [False, True])
def test_an_image_that_was_interrupted_on_its_way_out_leaves_all_the_same(
    cancel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(1)
    request = engine.submit(make_prompt(LONG))
    for _ in range(COUNT - 1):
        engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_leave", raising(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    plan = request.plan
    assert request.done
    if cancel:
        engine.cancel(request)
    else:
        assert len(engine.step()) == 0
    assert not engine.busy
    assert pages_taken(engine) == 0
    assert not request.cancelled
    assert request.plan is plan
    again = engine.submit(make_prompt(LONG[:3]))
    finish(engine)
    assert_as_alone(request, again)


def test_a_cache_that_not_even_one_image_fits_into_is_refused() -> None:
    with pytest.raises(ParameterError, match="accepted is at least 10, which one image takes"):
        make_engine(num_pages=9)


def test_nothing_to_do_is_no_step() -> None:
    engine = make_engine()
    assert len(engine.step()) == 0
    assert engine.generate([]) == []
