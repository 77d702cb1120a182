"""From the tokens that a step sampled to what the decoder reads next: ids, positions and slots."""

from __future__ import annotations

import torch
from torch import Tensor

from blip3o_rt.ops import native
from blip3o_rt.ops.registry import op
from blip3o_rt.ops.rounding import deliver


@op(tolerance={torch.int64: 0.0})
def advance_rows(
    draws: Tensor,
    first_ids: Tensor,
    page_table: Tensor,
    page_size: int,
    drawn: Tensor,
    context_lens: Tensor,
    places: Tensor,
    kept: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Take a token into each of B sequences: vocabulary ids int64 [B], draws + first_ids.

    draws int64 [B] number the tokens from first_ids int64 [B] on; -1, for which there is no token, counts as
    0. They are kept as they are: kept int64 [N] at places int64 [B], which are all different.
    context_lens int32 [B] is how many positions of its pages each sequence has: the token becomes the
    next, written to positions int32 [B]; its place in the cache, the page of page_table int32 [B,
    max_blocks] times page_size plus the offset in it, to slot_mapping int32 [B]. Then context_lens, places
    and drawn int32 [B], the number of tokens drawn, count one more.

    A row of context length 0 is padding, and one whose pages are full has no next position: both stay as they
    are, nothing is kept, position 0, slot -1.
    """
    goes_on = (context_lens > 0) & (context_lens < page_table.shape[1] * page_size)
    position = torch.where(goes_on, context_lens, 0)
    page = page_table.gather(1, (position // page_size).long()[:, None])[:, 0]
    slot_mapping.copy_(torch.where(goes_on, page * page_size + position % page_size, -1))
    positions.copy_(position)
    kept.index_copy_(0, places, torch.where(goes_on, draws, kept[places]))
    for count in (drawn, context_lens, places):
        count.add_(goes_on)
    return deliver(draws.clamp(min=0) + first_ids, torch.int64, out)


@advance_rows.implementation("cuda", device="cuda", dtypes=(torch.int64,), available=native.cuda_unavailable)
def _cuda(
    draws: Tensor,
    first_ids: Tensor,
    page_table: Tensor,
    page_size: int,
    drawn: Tensor,
    context_lens: Tensor,
    places: Tensor,
    kept: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    *,
    out: Tensor | None = None,
) -> Tensor:
    out = torch.empty_like(draws) if out is None else out
    native.cuda().advance_rows(
        draws,
        first_ids,
        page_table,
        page_size,
        drawn,
        context_lens,
        places,
        kept,
        positions,
        slot_mapping,
        out,
    )
    return out


@advance_rows.implementation("cpu", device="cpu", dtypes=(torch.int64,), available=native.cpu_unavailable)
def _cpu(
    draws: Tensor,
    first_ids: Tensor,
    page_table: Tensor,
    page_size: int,
    drawn: Tensor,
    context_lens: Tensor,
    places: Tensor,
    kept: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    *,
    out: Tensor | None = None,
) -> Tensor:
    out = torch.empty_like(draws) if out is None else out
    native.cpu().advance_rows(
        draws,
        first_ids,
        page_table,
        page_size,
        drawn,
        context_lens,
        places,
        kept,
        positions,
        slot_mapping,
        out,
    )
    return out
