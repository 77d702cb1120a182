"""Top-k, top-p and temperature sampling with counter-based random numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from blip3o_rt.ops import native
from blip3o_rt.ops.random import token_uniforms
from blip3o_rt.ops.registry import op
from blip3o_rt.ops.rounding import deliver
from blip3o_rt.ops.scratch import Scratch


@op(tolerance={torch.float32: 0.0})
def sample_tokens(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    *,
    scratch: Scratch | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """One token per row: logits float32 [B, V] -> int64 [B].

    temperature float32 [B] > 0; top_k int32 [B], 0 for all; top_p float32 [B], 1 for all; seeds int64 [B] and
    positions int32 [B] name the random numbers of the draw (ops/random.py, stream TOKENS). scratch: memory
    that a call may use (its own if there is none).

    Tokens are ordered by (logit descending, index ascending). The first top_k are kept; of those, the
    shortest prefix whose probability (softmax of logits / temperature over the kept) reaches top_p, at least
    one. The drawn token is the kept i with the largest logit_i / temperature - log(-log(u_i)), the lower
    index on a tie, u_i being the i-th uniform: an exact draw (Gumbel-max) that needs no sum over the tokens.

    Everything after the logits is float64, so implementations agree but for sums that end within a rounding
    of top_p. A row that holds NaN or +inf, or nothing finite, or whose temperature is not positive, gives -1
    and leaves the other rows alone. -inf is a token that is never drawn.
    """
    vocabulary = logits.shape[-1]
    values, order = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(vocabulary, device=logits.device)
    limit = torch.where(top_k > 0, top_k, vocabulary)[:, None]
    tempered = values.double() / temperature.double()[:, None]
    tempered = tempered.masked_fill(rank >= limit, -torch.inf)
    probability = torch.softmax(tempered, dim=-1)
    mass_before = probability.cumsum(dim=-1) - probability
    dropped = (mass_before >= top_p.double()[:, None]) & (top_p < 1)[:, None] & (rank > 0)
    gumbel = -torch.log(-torch.log(token_uniforms(seeds, positions, vocabulary)))
    score = (tempered + gumbel.gather(1, order)).masked_fill(dropped, -torch.inf)
    scores = torch.full_like(score, -torch.inf).scatter(1, order, score)  # back in the order of the tokens
    bad = torch.isnan(logits).any(-1) | (logits == torch.inf).any(-1) | (logits == -torch.inf).all(-1)
    tokens = scores.argmax(dim=-1).masked_fill(bad | ~(temperature > 0), -1)
    return deliver(tokens, torch.int64, out)


@sample_tokens.implementation(
    "cuda", device="cuda", dtypes=(torch.float32,), available=native.cuda_unavailable
)
def _cuda(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    *,
    scratch: Scratch | None = None,
    out: Tensor | None = None,
) -> Tensor:
    device = logits.device
    out = torch.empty(logits.shape[0], dtype=torch.int64, device=device) if out is None else out
    scratch = Scratch() if scratch is None else scratch
    memory = scratch.memory(native.cuda().sample_tokens_workspace(*logits.shape), torch.int64, device)
    native.cuda().sample_tokens(logits, temperature, top_k, top_p, seeds, positions, scratch=memory, out=out)
    return out


@sample_tokens.implementation("cpu", device="cpu", dtypes=(torch.float32,), available=native.cpu_unavailable)
def _cpu(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    *,
    scratch: Scratch | None = None,
    out: Tensor | None = None,
) -> Tensor:
    out = torch.empty(logits.shape[0], dtype=torch.int64) if out is None else out
    native.cpu().sample_tokens(logits, temperature, top_k, top_p, seeds, positions, out=out)
    return out
