"""The sampler by frequency, membership and reproducibility, against transformers' logits processors."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from blip3o_rt import ops
from blip3o_rt.measure.validate.case import int32, random

IMPLEMENTATIONS = [
    i.name for i in ops.sample_tokens.implementations if not i.available() and i.device != "cuda"
]


@pytest.fixture(params=IMPLEMENTATIONS, autouse=True)
def implementation(request: pytest.FixtureRequest):
    with ops.force("sample_tokens", request.param):
        yield request.param


def draw(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    batch = logits.shape[0]
    return ops.sample_tokens(
        logits,
        torch.full((batch,), temperature),
        int32([top_k] * batch),
        torch.full((batch,), top_p),
        torch.arange(batch) if seeds is None else seeds,
        int32([0] * batch) if positions is None else positions,
    )


def published_probabilities(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Probabilities [V] by transformers: temperature, then top-k, then top-p."""
    scores = TemperatureLogitsWarper(temperature)(None, logits[None].clone())
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    return torch.softmax(scores[0], dim=-1)


@pytest.mark.parametrize("vary", ["seeds", "positions"])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (1.0, 12, 1.0), (1.0, 0, 0.8), (1.0, 25, 0.9), (0.7, 25, 0.9), (1.6, 25, 0.6)],
)
def test_frequencies(vary: str, temperature: float, top_k: int, top_p: float) -> None:
    """Chi-square over 8,000 draws with fixed seeds; p < 1e-4 would be a wrong distribution, not bad luck."""
    count = 8000
    logits = random(4, 40, scale=1.5)
    expected = published_probabilities(logits, temperature, top_k, top_p)
    numbers = {
        "seeds": torch.arange(count) if vary == "seeds" else torch.full((count,), 99),
        "positions": int32(range(count) if vary == "positions" else [7] * count),
    }
    drawn = draw(logits.expand(count, -1), temperature=temperature, top_k=top_k, top_p=top_p, **numbers)
    observed = torch.bincount(drawn, minlength=40)
    assert observed[expected == 0].sum() == 0  # membership: nothing that the processors rule out
    common = expected * count >= 5  # the usual condition of the test; the rest is one class
    observed_classes = [*observed[common].tolist(), int(observed[~common].sum())]
    expected_classes = [*(expected[common] * count).tolist(), float(expected[~common].sum() * count)]
    if expected_classes[-1] < 1e-3 * count:
        observed_classes, expected_classes = observed_classes[:-1], expected_classes[:-1]
        expected_classes = [e * sum(observed_classes) / sum(expected_classes) for e in expected_classes]
    assert stats.chisquare(observed_classes, expected_classes).pvalue > 1e-4


@pytest.mark.parametrize(("top_k", "top_p"), [(1, 1.0), (30, 1.0), (0, 0.5), (1200, 0.95)])
def test_membership_in_a_large_vocabulary(top_k: int, top_p: float) -> None:
    logits = random(5, 3, 20000, scale=2.0)
    drawn = draw(logits, top_k=top_k, top_p=top_p)
    for row, token in zip(logits, drawn.tolist(), strict=True):
        assert published_probabilities(row, 1.0, top_k, top_p)[token] > 0


def test_same_numbers_same_tokens() -> None:
    logits, seeds = random(6, 64, 500), torch.arange(64) * 12345
    positions = int32(range(64))
    first = draw(logits, seeds=seeds, positions=positions)
    assert torch.equal(first, draw(logits, seeds=seeds, positions=positions))
    assert not torch.equal(first, draw(logits, seeds=seeds + 1, positions=positions))
    assert not torch.equal(first, draw(logits, seeds=seeds, positions=positions + 1))
    assert not torch.equal(first, draw(logits, seeds=seeds + 2**32, positions=positions))


def test_one_seed_draws_differently_at_each_position() -> None:
    drawn = draw(torch.zeros(200, 1000), seeds=torch.full((200,), 3), positions=int32(range(200)))
    assert len(set(drawn.tolist())) > 150  # 181 expected of 200 draws from 1,000


def test_greedy_takes_the_lowest_index_of_equals() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [0.0, -0.0, -1.0, 0.0], [-5.0, -5.0, -5.0, -5.0]])
    assert draw(logits, top_k=1).tolist() == [1, 0, 0]
    assert draw(-logits, top_k=1).tolist() == [0, 2, 0]
    assert draw(torch.tensor([[-0.0, 0.0, -1.0]]), top_k=1).tolist() == [0]  # the zeros are equal


def test_ties_at_the_limit_go_to_the_lower_indices() -> None:
    logits = torch.tensor([2.0, 1.0, 5.0, 1.0, 1.0, 0.0]).expand(3000, -1)
    assert set(draw(logits, top_k=4).tolist()) == {0, 1, 2, 3}


def test_top_p_keeps_the_token_that_crosses_it() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(2000, -1)
    assert set(draw(logits, top_p=0.79).tolist()) == {0, 1}
    assert set(draw(logits, top_p=0.81).tolist()) == {0, 1, 2}
    assert set(draw(logits, top_p=0.0).tolist()) == {0}


def test_broken_rows_give_minus_one_and_leave_the_others_alone() -> None:
    logits = random(7, 6, 50)
    whole = draw(logits, top_k=20, top_p=0.9)
    logits[0, 3], logits[2, 0], logits[4] = torch.nan, torch.inf, -torch.inf
    drawn = draw(logits, top_k=20, top_p=0.9)
    assert drawn[[0, 2, 4]].tolist() == [-1, -1, -1]
    assert torch.equal(drawn[[1, 3, 5]], whole[[1, 3, 5]])
    assert draw(random(7, 1, 50), temperature=0.0).tolist() == [-1]


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.full((500, 30), -torch.inf)
    logits[:, [4, 9]] = 0.0
    assert set(draw(logits, top_k=10).tolist()) == {4, 9}
    assert set(draw(logits).tolist()) == {4, 9}
