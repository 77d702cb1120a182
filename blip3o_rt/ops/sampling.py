"""Sampling: a token from logits, the decoder's next inputs, and a step of the diffusion sampler."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from blip3o_rt.errors import OpError
from blip3o_rt.ops import native
from blip3o_rt.ops.dtypes import cast_out, compute_dtype
from blip3o_rt.ops.random import token_uniforms
from blip3o_rt.ops.registry import op
from blip3o_rt.ops.scratch import Scratch

__all__ = ["advance_windows", "guided_euler_step", "sample_tokens"]


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

    Tokens are ordered by (logit descending, index ascending). The first top_k are kept. Of those, the
    shortest prefix is kept whose probability (softmax of logits / temperature over the kept) reaches top_p;
    it has at least one token. The drawn token is the kept i with the largest logit_i / temperature -
    log(-log(u_i)), the lower index on a tie, u_i being the i-th uniform: an exact draw (Gumbel-max) that
    needs no sum over tokens.

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


def _sampling_scratch(scratch: Scratch, call: Any) -> tuple[Tensor, Tensor]:
    size, device = native.cuda().sample_tokens_workspace(*call.logits.shape), call.logits.device
    return scratch.memory(size, torch.int64, device), scratch.counters(len(call.logits), device)


sample_tokens.native("cuda", dtypes=(torch.float32,), scratch=_sampling_scratch)
sample_tokens.native("cpu", dtypes=(torch.float32,))


@op(
    "sampled_ids [R], cu_rows [B + 1], first_ids [R], page_table [R, max_pages], num_generated [R], "
    "context_lens [R], output_slots [R], output_ids [N], positions [R], slot_mapping [R], embedding [V, D], "
    "embedded [R, D] -> [R]",
    tolerance={torch.int64: 0.0},
)
def advance_windows(
    sampled_ids: Tensor,
    cu_rows: Tensor,
    first_ids: Tensor,
    page_table: Tensor,
    page_size: int,
    tokens_per_image: int,
    grid_width: int,
    num_generated: Tensor,
    context_lens: Tensor,
    output_slots: Tensor,
    output_ids: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    *,
    embedding: Tensor | None = None,
    embedded: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Keep the draws of B images that are right and move their windows on: vocabulary ids int64 [R].

    Image b has the rows cu_rows[b] .. cu_rows[b + 1] - 1 (int32 [B + 1]) of R: its window, of at least one
    row. The first row read the newest token that is kept, each further row a guess of the next token. Row j
    drew sampled_ids int64 [R], its token number num_generated[j] (int32 [R]). The draw of the first row is
    right. Another is right where the draw of each row before it is the guess that was read there. The right
    draws are kept; the window moves on to begin at the last of them.

    output_ids int64 [N] holds an image's tokens, kept and guessed, in consecutive slots. output_slots
    int64 [R] is that of the token that a row draws. Guesses are the draws beyond those that are kept, then
    either the token one row of the grid up, grid_width before, or the last one, whichever agreed more often
    with the tokens kept so far. Ids count from first_ids int64 [R] on; the id -1 (no token could be sampled)
    reads as 0.

    Of each new row are written its position (positions int32 [R]) and its slot in the cache (slot_mapping
    int32 [R], from page_table int32 [R, max_pages]); num_generated, output_slots, and context_lens
    int32 [R], the cached positions with its own. A row past the image's last token is padding: context
    length 0, position 0, slot -1, output slot N - 1. The next call takes it for one that drew nothing.

    A window whose first row has context length 0, or whose pages or slots cannot hold tokens_per_image, and
    a row of no window stay as they are: the id 0, position 0, slot -1.

    With an `embedding` [V, D], `embedded` [R, D] receives the row of it that each id names; of an id that is
    none of V it is NaN. The embedding has the dtype of `embedded`, or is bfloat16 beside float32.
    """
    if (embedding is None) != (embedded is None):
        raise OpError("advance_windows: embedding and embedded must be given together")
    rows, slots = len(sampled_ids), len(output_ids)
    if rows == 0:
        return cast_out(first_ids, torch.int64, out)
    cu_rows = torch.cat([cu_rows, cu_rows[-1:]])  # one more, empty window: there is always one
    windows = len(cu_rows) - 1
    device = sampled_ids.device
    first = cu_rows[:-1].long().clamp(max=rows - 1)
    sizes = cu_rows.diff().long()
    kept, context, slot = num_generated[first].long(), context_lens[first].long(), output_slots[first]
    base = slot - kept
    moves = (
        (sizes > 0)
        & (context > 0)
        & (context - kept + tokens_per_image <= page_table.shape[1] * page_size)
        & (base >= 0)
        & (base + tokens_per_image < slots)
    )

    # Right draws: a row counts while all rows before it drew what the next one had read.
    row = torch.arange(rows, device=device)
    index = (first[:, None] + row).clamp(max=rows - 1)
    decoded = ((row < sizes[:, None]) & (context_lens[index] > 0)).long().cumprod(1).sum(1)
    drawn = torch.minimum(decoded, tokens_per_image - kept)
    sampled = sampled_ids[index]
    guessed = output_ids[(slot[:, None] + row).clamp(0, slots - 1)]
    agrees = (sampled.clamp(min=0) == guessed.clamp(min=0)) & (row + 1 < drawn[:, None])
    following = kept + torch.minimum(1 + agrees.long().cumprod(1).sum(1), drawn)

    # The images' tokens: kept, drawn, guessed.
    token = torch.arange(tokens_per_image, device=device)
    places = (base[:, None] + token).clamp(0, slots - 1)
    ids = output_ids[places]
    seen = (token >= grid_width) & (token < kept[:, None])
    above, last = (((ids == ids.roll(by, 1)) & seen).sum(1) for by in (grid_width, 1))
    number = token - kept[:, None]
    is_drawn = (number >= 0) & (number < drawn[:, None])
    ids = torch.where(is_drawn, sampled.gather(1, number.clamp(0, rows - 1)), ids)
    end = (kept + drawn)[:, None]
    up = (torch.div(token - end, grid_width, rounding_mode="floor") + 1) * grid_width
    source = torch.where((above >= last)[:, None] & (token >= up), token - up, end - 1)
    is_guessed = (token >= end) & (token < (following - 1 + sizes)[:, None])
    ids = torch.where(is_guessed, ids.gather(1, source.clamp(0, tokens_per_image - 1)), ids)
    written = moves[:, None] & (is_drawn | is_guessed)
    target = torch.where(written, places, slots - 1)
    output_ids[target] = torch.where(written, ids, output_ids[slots - 1])

    # The rows of the windows that move.
    window = (torch.searchsorted(cu_rows, row.int(), right=True) - 1).clamp(max=windows - 1)
    moved = (row < cu_rows[-1]) & moves[window]
    newest = following[window] - 1 + row - cu_rows[window]  # the token that the row reads
    goes_on = moved & (newest < tokens_per_image)
    newest = newest.clamp(0, tokens_per_image - 1)
    position = torch.where(goes_on, (context - kept)[window] + newest, 0)
    page = page_table.gather(1, (position // page_size)[:, None])[:, 0]
    positions.copy_(position)
    slot_mapping.copy_(torch.where(goes_on, page * page_size + position % page_size, -1))
    for count, value, padding in (
        (num_generated, newest + 1, 0),
        (context_lens, position + 1, 0),
        (output_slots, base[window] + newest + 1, slots - 1),
    ):
        count.copy_(torch.where(moved, torch.where(goes_on, value, padding), count))
    read = torch.where(goes_on, ids[window, newest].clamp(min=0), 0)
    read = read + first_ids
    if embedding is not None and embedded is not None:
        known = ((read >= 0) & (read < len(embedding)))[:, None]
        embedded.copy_(torch.where(known, embedding[read.clamp(0, len(embedding) - 1)], torch.nan))
    return cast_out(read, torch.int64, out)


advance_windows.native("cuda", dtypes=(torch.int64,))
advance_windows.native("cpu", dtypes=(torch.int64,))


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
