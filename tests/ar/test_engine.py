"""The token engine: greedy decoding as transformers does it, sharing, waves, failures and cancellation."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from blip3o_rt.ar.engine import TokenEngine, TokenPlan, TokenPrompt
from blip3o_rt.errors import Cancelled
from blip3o_rt.params import SamplingParams
from tests.ar.oracle import image_tokens, oracle, runtime_weights, small_config
from tests.ar.test_decoder import FLOAT32_TOLERANCE, relative_l2

CONFIG = small_config()
TOKENS = image_tokens(CONFIG)
SAMPLED = SamplingParams(top_k=20, top_p=0.95)


def make_engine(max_batch: int = 4, dtype: torch.dtype = torch.float32) -> TokenEngine:
    weights = runtime_weights(CONFIG, oracle(CONFIG), dtype)
    return TokenEngine(CONFIG, TOKENS, weights, max_batch=max_batch, max_prompt_tokens=40, page_size=4)


def prompts(ids: list[int], *seeds: int) -> list[TokenPrompt]:
    return [TokenPrompt(ids, dataclasses.replace(SAMPLED, seed=seed)) for seed in seeds]


def assert_same(found: TokenPlan, expected: TokenPlan) -> None:
    assert torch.equal(found.token_ids, expected.token_ids)
    assert torch.equal(found.hidden_states, expected.hidden_states)


def test_greedy_tokens_and_hidden_states_match_transformers() -> None:
    model = oracle(CONFIG)
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    (plan,) = make_engine().generate([TokenPrompt(prompt, SamplingParams(top_k=1))])
    ids = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(TOKENS.tokens_per_image):
            logits = model(ids).logits[0, -1, TOKENS.image_start_token_id :]
            ids = torch.cat([ids, logits.argmax()[None, None] + TOKENS.image_start_token_id], dim=1)
        hidden = model(ids, output_hidden_states=True).hidden_states[-1][0, len(prompt) - 1 :]
    assert plan.token_ids.tolist() == ids[0, len(prompt) :].tolist()
    assert plan.hidden_states.shape == (TOKENS.tokens_per_image + 1, CONFIG.hidden_size)
    assert relative_l2(plan.hidden_states, hidden) < FLOAT32_TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_batch", [1, 3, 8])
def test_batches_waves_and_order_change_nothing(max_batch: int, dtype: torch.dtype) -> None:
    asked = [*prompts([3, 1, 4], 5, 6, 7), *prompts([2], 5), *prompts(list(range(1, 40)), 11, 5)]
    engine = make_engine(max_batch, dtype)
    found = engine.generate(asked)
    backwards = engine.generate(asked[::-1])[::-1]
    for index, prompt in enumerate(asked):
        (alone,) = engine.generate([prompt])
        assert_same(found[index], alone)
        assert_same(backwards[index], alone)
    assert engine.cache.free_pages == engine.cache.num_pages


def test_seeds_differ_and_repeat() -> None:
    engine = make_engine()
    first, other, again = engine.generate(prompts([3, 1, 4], 1, 2, 1))
    assert_same(first, again)
    assert not torch.equal(first.token_ids, other.token_ids)


def test_one_batch_mixes_vocabularies_and_parameters() -> None:
    engine = make_engine()
    params = [
        dataclasses.replace(SAMPLED, seed=1),
        dataclasses.replace(SAMPLED, seed=2, image_tokens_only=False, top_k=0, top_p=1.0, temperature=3.0),
        dataclasses.replace(SAMPLED, seed=3, top_k=1),
    ]
    asked = [TokenPrompt([3, 1, 4], one) for one in params]
    together = engine.generate(asked)
    for plan, prompt in zip(together, asked, strict=True):
        assert_same(plan, *engine.generate([prompt]))
    allowed = set(TOKENS.image_token_range)
    assert set(together[0].token_ids.tolist()) <= allowed
    assert not set(together[1].token_ids.tolist()) <= allowed


def test_a_prompt_that_overflows_fails_alone() -> None:
    engine = make_engine()
    (healthy,) = prompts([3, 1, 4], 5)
    features = torch.full((1, CONFIG.hidden_size), float("nan"))
    broken = dataclasses.replace(healthy, features=features, feature_positions=range(1, 2))
    failed, fine = engine.generate([broken, healthy])
    assert failed.error is not None
    assert "not finite" in str(failed.error)
    assert fine.error is None
    assert_same(fine, *engine.generate([healthy]))


def test_features_replace_embeddings() -> None:
    engine = make_engine()
    (as_ids,) = engine.generate(prompts([3, 1, 4], 5))
    features = engine.decoder.embed(torch.tensor([1]))
    (other,) = prompts([3, 0, 4], 5)
    with_features = dataclasses.replace(other, features=features, feature_positions=range(1, 2))
    (as_features,) = engine.generate([with_features])
    assert_same(as_features, as_ids)


def test_replaying_tokens_gives_the_hidden_states_of_decoding() -> None:
    engine = make_engine()
    (prompt,) = prompts([3, 1, 4, 1, 5], 9)
    (plan,) = engine.generate([prompt])
    replayed = engine.replay(prompt, plan.token_ids)
    assert torch.equal(replayed.token_ids, plan.token_ids)
    assert relative_l2(replayed.hidden_states, plan.hidden_states) < FLOAT32_TOLERANCE
    assert engine.cache.free_pages == engine.cache.num_pages


def test_progress_counts_every_token_and_cancelling_returns_the_pages() -> None:
    engine = make_engine(max_batch=2)
    asked = prompts([3, 1, 4], 1, 2, 3)
    seen: list[int] = []
    engine.generate(asked, seen.append)
    assert seen[0] == 0
    assert seen[-1] == 3 * TOKENS.tokens_per_image
    assert seen == sorted(seen)

    def cancel(done: int) -> None:
        if done >= 6:
            raise Cancelled("stop")

    with pytest.raises(Cancelled):
        engine.generate(asked, cancel)
    assert engine.cache.free_pages == engine.cache.num_pages
