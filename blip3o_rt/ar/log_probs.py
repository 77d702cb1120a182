"""How likely the drawn tokens were: of the whole vocabulary, and of what was left to draw from."""

from __future__ import annotations

import torch
from torch import Tensor

from blip3o_rt.ar.model import Decoder
from blip3o_rt.config import ImageTokenConfig
from blip3o_rt.params import SamplingParams

ROWS = 16  # positions whose logits exist at a time


def token_log_probs(
    decoder: Decoder,
    image_tokens: ImageTokenConfig,
    sampling: SamplingParams,
    hidden_states: Tensor,
    token_ids: Tensor,
) -> tuple[Tensor, Tensor]:
    """The log-probabilities of one image's tokens, from the hidden states that they were drawn from.

    The logits are those of the draw, bit for bit: the head's product does not depend on the batch.

    Args:
        decoder: Has the head.
        image_tokens: Which ids are image tokens.
        sampling: How the tokens were drawn.
        hidden_states: [T, hidden], row t the state that token t was drawn from.
        token_ids: int64 [T], vocabulary ids.

    Returns:
        Raw, float32 [T]: over the whole vocabulary, at temperature 1. Processed, float32 [T]: after
        temperature, top_k and top_p over what is drawn from, -inf for a token that they leave out.
    """
    vocabulary = range(decoder.config.vocab_size)
    drawn_from = image_tokens.image_token_range if sampling.image_tokens_only else vocabulary
    top_k = sampling.top_k_for(image_tokens.num_image_tokens, len(vocabulary))
    logits = torch.empty(ROWS, len(vocabulary), dtype=torch.float32, device=decoder.device)
    raw, processed = [], []
    for states, tokens in zip(
        hidden_states.to(decoder.device).split(ROWS), token_ids.to(decoder.device).split(ROWS), strict=True
    ):
        rows = decoder.logits(states, vocabulary, out=logits[: len(states)])
        raw.append(_picked(rows.double().log_softmax(-1), tokens))
        left = kept_logits(
            rows[:, drawn_from.start : drawn_from.stop], sampling.temperature, top_k, sampling.top_p
        )
        inside = (tokens >= drawn_from.start) & (tokens < drawn_from.stop)
        places = (tokens - drawn_from.start).clamp(0, len(drawn_from) - 1)
        processed.append(_picked(left.log_softmax(-1), places).masked_fill(~inside, -torch.inf))
    return torch.cat(raw).float(), torch.cat(processed).float()


def kept_logits(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Logits [B, V] over the temperature, float64, -inf where the draw leaves a token out.

    What is kept is what `ops.sample_tokens` keeps: the first top_k in the order (logit descending, index
    ascending), 0 for all, and of those the shortest prefix whose probability reaches top_p.
    """
    values, order = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(values.shape[-1], device=values.device)
    tempered = values.double() / temperature
    if top_k:
        tempered = tempered.masked_fill(rank >= top_k, -torch.inf)
    if top_p < 1:
        probability = tempered.softmax(-1)
        mass_before = probability.cumsum(-1) - probability
        tempered = tempered.masked_fill((mass_before >= top_p) & (rank > 0), -torch.inf)
    return torch.full_like(tempered, -torch.inf).scatter(1, order, tempered)


def _picked(rows: Tensor, places: Tensor) -> Tensor:
    return rows.gather(1, places[:, None])[:, 0]
