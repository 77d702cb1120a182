"""Vocabularies from one token on, every mix of top-k and top-p, ties, impossible tokens and broken rows."""

from collections.abc import Iterator

import torch
from torch import Tensor

from blip3o_rt.measure.validate.case import Case, int32, random


def case(label: str, logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Case:
    batch = logits.shape[0]
    per_row = (torch.full((batch,), temperature), int32([top_k] * batch), torch.full((batch,), top_p))
    seeds = torch.arange(batch) * 2**40 - 3  # negative, and more than 32 bits
    return Case(label, (logits, *per_row, seeds, int32(range(5, 5 + batch))))


def cases() -> Iterator[Case]:
    for vocabulary in (1, 2, 5, 1000, 4099):
        logits = random(vocabulary, 4, vocabulary, scale=3.0)
        for top_k in dict.fromkeys((0, 1, 4, vocabulary, vocabulary + 7)):
            for top_p in (1.0, 0.9, 1e-6):
                label = f"{vocabulary} tokens, top_k {top_k}, top_p {top_p}"
                yield case(label, logits, 1.0, top_k, top_p)
    logits = random(2, 3, 40_000, scale=3.0)
    logits[1] = (logits[1] * 4).round() / 4  # ties
    logits[2, :20_000] = -torch.inf
    for top_k, top_p in ((0, 1.0), (1200, 0.95), (1200, 1.0), (9000, 0.8), (0, 0.9), (0, 1e-6)):
        yield case(f"many tokens, top_k {top_k}, top_p {top_p}", logits, 1.0, top_k, top_p)
    broken = random(3, 3, 40_000)
    broken[0, 39_999], broken[2, 0] = torch.nan, torch.inf
    yield case("many tokens, broken rows", broken, 1.0, 50)
    logits = random(1, 8, 300, scale=2.0)
    yield case("hot", logits, 3.0, 40, 0.8)
    yield case("cold", logits, 0.01, 40, 0.8)
    ties = (logits * 2).round() / 2 * torch.where(logits > 0, 1.0, -1.0)  # some zeros are negative
    for top_k in (1, 17, 50, 299):
        yield case(f"ties, top_k {top_k}", ties, 1.0, top_k, 0.93)
    yield case("one logit everywhere", torch.full((4, 50), -2.5), 1.0, 7)
    zeros = torch.zeros(4, 50)
    zeros[:, 1::3] = -0.0
    yield case("zeros of both signs", zeros, 1.0, 7)
    masked = logits.masked_fill(torch.arange(300) % 3 > 0, -torch.inf)
    for top_k, top_p in ((0, 1.0), (150, 1.0), (150, 0.9), (10, 0.5)):
        yield case(f"impossible tokens, top_k {top_k}, top_p {top_p}", masked, 1.0, top_k, top_p)
    broken = logits.clone()
    broken[1, 7], broken[3, 299], broken[5], broken[6, :299] = torch.nan, torch.inf, -torch.inf, -torch.inf
    yield case("broken rows", broken, 1.0, 20, 0.9)
    yield case("broken rows, greedy", broken, 1.0, 1)
    mixed = case("each row its own parameters", logits)
    mixed.arguments[1][:] = torch.tensor([1, 0.5, 2, 0, -1, torch.nan, 1, 1])
    mixed.arguments[2][:] = int32([0, 1, 2, 3, 4, 5, 300, -1])
    mixed.arguments[3][:] = torch.tensor([0.1, 1, 0.9, 1, 1, 1, 0.99, 0.0])
    yield mixed
