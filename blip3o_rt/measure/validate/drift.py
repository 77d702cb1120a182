"""What a lossy decoder loses: how likely it finds the tokens that the exact one drew, beside that one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blip3o_rt.ar.engine import TokenEngine, TokenPrompt


@dataclass(frozen=True)
class Drift:
    """Means over all tokens. `exact` and `lossy`: cross-entropy of the exact decoder's tokens, in nats;
    `divergence`: Kullback-Leibler divergence of the lossy distribution from the exact one, in nats;
    `agreement`: share of the places where both find the same token likeliest."""

    tokens: int
    exact: float
    lossy: float
    divergence: float
    agreement: float


def token_drift(exact: TokenEngine, lossy: TokenEngine, prompts: Sequence[TokenPrompt]) -> Drift:
    """Draw every prompt's image with the exact engine, then let both read its tokens.

    Distributions are over the image tokens, at temperature 1 and before top-k and top-p.
    """
    totals = torch.zeros(4, dtype=torch.float64)
    count = 0
    for prompt, plan in zip(prompts, exact.generate(list(prompts)), strict=True):
        expected, found = (_log_probabilities(engine, prompt, plan.token_ids) for engine in (exact, lossy))
        first = exact.image_tokens.image_token_range.start
        drawn = (plan.token_ids.cpu() - first)[:, None]
        totals += torch.stack(
            [
                -expected.gather(1, drawn).sum(),
                -found.gather(1, drawn).sum(),
                (expected.exp() * (expected - found)).sum(),
                (expected.argmax(dim=1) == found.argmax(dim=1)).sum(),
            ]
        )
        count += len(drawn)
    return Drift(count, *(totals / count).tolist())


def _log_probabilities(engine: TokenEngine, prompt: TokenPrompt, tokens: Tensor) -> Tensor:
    """float64 [T, codes] on the CPU: of every token given those before it."""
    hidden = engine.replay(prompt, tokens).hidden_states[:-1]
    codes = engine.image_tokens.image_token_range
    logits = torch.empty(len(hidden), len(codes), dtype=torch.float32, device=hidden.device)
    return engine.decoder.logits(hidden, codes, out=logits).cpu().double().log_softmax(dim=1)
