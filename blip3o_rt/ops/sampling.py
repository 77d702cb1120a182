"""Sampling: a token from logits, the decoder's next inputs, and a step of the diffusion sampler."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from blip3o_rt.ops import native
from blip3o_rt.ops.dtypes import cast_out, compute_dtype
from blip3o_rt.ops.random import token_uniforms
from blip3o_rt.ops.registry import op
from blip3o_rt.ops.scratch import Scratch

__all__ = ["advance_rows", "guided_euler_step", "sample_tokens"]


@op(
    "logits [B, V], temperature [B], top_k [B], top_p [B], seeds [B], positions [B] -> [B]",
    tolerance={torch.float32: 0.0},
    out_dtype=torch.int64,
)
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
    return cast_out(tokens, torch.int64, out)


def _sampling_scratch(scratch: Scratch, call: Any) -> Tensor:
    size = native.cuda().sample_tokens_workspace(*call.logits.shape)
    return scratch.memory(size, torch.int64, call.logits.device)


sample_tokens.native("cuda", dtypes=(torch.float32,), scratch=_sampling_scratch)
sample_tokens.native("cpu", dtypes=(torch.float32,))


@op(
    "sampled_ids [B], first_ids [B], page_table [B, max_blocks], num_generated [B], context_lens [B], "
    "output_slots [B], output_ids [N], positions [B], slot_mapping [B] -> [B]",
    tolerance={torch.int64: 0.0},
)
def advance_rows(
    sampled_ids: Tensor,
    first_ids: Tensor,
    page_table: Tensor,
    page_size: int,
    num_generated: Tensor,
    context_lens: Tensor,
    output_slots: Tensor,
    output_ids: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Append a token to each of B sequences: vocabulary ids int64 [B], sampled_ids + first_ids.

    sampled_ids int64 [B] count from first_ids int64 [B] on. The id -1 (no token could be sampled) reads as 0.
    The sampled ids are kept: output_ids int64 [N] receives them at output_slots int64 [B], which are all
    different. context_lens int32 [B] is the number of cached positions of each sequence. The token takes the
    next one, which is written to positions int32 [B]. Its slot in the cache is written to slot_mapping
    int32 [B]: the page in page_table int32 [B, max_blocks] times page_size, plus the offset in the page.
    Then context_lens, output_slots and num_generated int32 [B], the number of tokens so far, grow by one.

    A row of context length 0 is padding, and one whose pages are full has no next position. Both stay as they
    are: no output, position 0, slot -1.
    """
    goes_on = (context_lens > 0) & (context_lens < page_table.shape[1] * page_size)
    position = torch.where(goes_on, context_lens, 0)
    page = page_table.gather(1, (position // page_size).long()[:, None])[:, 0]
    slot_mapping.copy_(torch.where(goes_on, page * page_size + position % page_size, -1))
    positions.copy_(position)
    output_ids.index_copy_(0, output_slots, torch.where(goes_on, sampled_ids, output_ids[output_slots]))
    for count in (num_generated, context_lens, output_slots):
        count.add_(goes_on)
    return cast_out(sampled_ids.clamp(min=0) + first_ids, torch.int64, out)


advance_rows.native("cuda", dtypes=(torch.int64,))
advance_rows.native("cpu", dtypes=(torch.int64,))


@op(
    "latent [1, C, H, W], prediction [2, C, H, W], guidance_scale [], delta_sigma [] -> [1, C, H, W]",
    tolerance={torch.float32: 1e-6},
)
def guided_euler_step(
    latent: Tensor,
    prediction: Tensor,
    guidance_scale: Tensor,
    delta_sigma: Tensor,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """latent + delta_sigma * (uncond + guidance_scale * (cond - uncond)) -> [1, C, H, W] fp32.

    latent fp32 [1, C, H, W], prediction fp32 [2, C, H, W] = (uncond, cond) (either may be a strided part
    of a larger tensor), guidance_scale and delta_sigma fp32 scalars (tensors, so that a captured step can be
    replayed with other values). `out` may be latent. (Guidance: arXiv 2207.12598.)
    """
    dtype = compute_dtype(latent)
    unconditional, conditional = prediction.to(dtype).split(1)
    guided = unconditional + guidance_scale.to(dtype) * (conditional - unconditional)
    return cast_out(latent + delta_sigma.to(dtype) * guided, latent.dtype, out)


def _beside_latent(call: Any) -> str | None:
    for tensor in (call.prediction, call.guidance_scale, call.delta_sigma, call.out):
        if tensor is not None and (tensor.dtype != torch.float32 or tensor.device != call.latent.device):
            return "takes fp32 tensors on one device"
    return None


guided_euler_step.triton(dtypes=(torch.float32,), supports=_beside_latent)
