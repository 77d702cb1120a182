"""The decoder against transformers: prompt ids, greedy tokens, hidden states drawn and replayed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from blip3o_rt.ar.engine import TokenEngine, TokenPlan, TokenPrompt
from blip3o_rt.ar.prompt import PromptEncoder
from blip3o_rt.machine import exact_arithmetic
from blip3o_rt.measure.validate.bounds import equal_line, tensor_line
from blip3o_rt.measure.validate.choices import choice_line
from blip3o_rt.measure.validate.line import Line
from blip3o_rt.measure.validate.subject import PROMPT, Subject
from blip3o_rt.params import SamplingParams

GREEDY = SamplingParams(top_k=1)


class Passes(NamedTuple):
    """What a published model makes of one prompt and tokens: hidden states [1, T + 1, hidden], and scores
    [T, codes] of the image tokens."""

    hidden: Tensor
    scores: Tensor


def ar_lines(subject: Subject, dtypes: Sequence[str]) -> Iterator[Line]:
    """The decoder's lines in each dtype; one model at a time is in memory."""
    ours = {dtype: _ours(subject, dtype) for dtype in dtypes}
    drawn = {dtype: plan.token_ids[None].cpu() for dtype, (plan, _, _) in ours.items()}
    exact = _published(subject, "fp32", [subject.tokens, *drawn.values()])
    yardstick = _published(subject, "bf16", [subject.tokens, drawn["bf16"]]) if "bf16" in dtypes else []
    exact_ids = subject.prompt_ids
    for index, (dtype, (plan, replayed, prompt_ids)) in enumerate(ours.items()):
        replay_exact, drawn_exact = exact[0], exact[1 + index]
        rounded = yardstick if dtype == "bf16" else []
        yield equal_line("ar", "prompt ids", dtype, prompt_ids, exact_ids, why="the same tokenizer")
        start = subject.config.image_tokens.image_token_range.start
        scores = rounded[1].scores if rounded else None
        yield choice_line(
            "ar", "greedy tokens", dtype, plan.token_ids.cpu() - start, drawn_exact.scores, scores, "token"
        )
        for name, found, published, place in (
            ("hidden states, token by token", plan.hidden_states, drawn_exact, 1),
            ("hidden states, replayed", replayed.hidden_states, replay_exact, 0),
        ):
            other = rounded[place].hidden if rounded else None
            yield tensor_line("ar", name, dtype, found[None], published.hidden, other)


def _ours(subject: Subject, dtype: str) -> tuple[TokenPlan, TokenPlan, Tensor]:
    """Greedy tokens, given tokens replayed, and the prompt's ids [1, P]."""
    checkpoint = subject.ours(dtype, "ar")
    config = checkpoint.config
    encoder = PromptEncoder(checkpoint.tokenizer_dir, config.image_tokens, config.ar.max_position_embeddings)
    ids, _ = encoder.encode(PROMPT)
    engine = TokenEngine(
        config.ar, config.image_tokens, checkpoint.weights["ar"], max_batch=1, max_prompt_tokens=len(ids)
    )
    with exact_arithmetic(subject.device):
        engine.capture()
        prompt = TokenPrompt(ids, GREEDY)
        (plan,) = engine.generate([prompt])
        replayed = engine.replay(prompt, subject.tokens[0])
    if plan.error is not None:
        raise plan.error
    return plan, replayed, torch.tensor([ids])


def _published(subject: Subject, dtype: str, sequences: Sequence[Tensor]) -> list[Passes]:
    """A pass over prompt and tokens for each sequence [1, T]."""
    model = subject.published(dtype)
    prompt = model.prompt(PROMPT)
    image_tokens = subject.config.image_tokens.image_token_range
    passes: list[Passes] = []
    for tokens in sequences:
        hidden = model.hidden_states(prompt, tokens)
        scores = model.logits(hidden[:, :-1])[0, :, image_tokens.start : image_tokens.stop]
        passes.append(Passes(hidden, scores.clone()))
    return passes
