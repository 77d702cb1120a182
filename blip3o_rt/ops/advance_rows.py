"""From the tokens that a step sampled to what the decoder reads next: ids, positions and slots."""

from __future__ import annotations

import torch
from torch import Tensor

from blip3o_rt.ops import native
from blip3o_rt.ops.registry import op
from blip3o_rt.ops.rounding import deliver


@op(tolerance={torch.int64: 0.0})
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
    return deliver(sampled_ids.clamp(min=0) + first_ids, torch.int64, out)


@advance_rows.implementation("cuda", device="cuda", dtypes=(torch.int64,), available=native.cuda_unavailable)
def _cuda(
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
    out = torch.empty_like(sampled_ids) if out is None else out
    native.cuda().advance_rows(
        sampled_ids,
        first_ids,
        page_table,
        page_size,
        num_generated,
        context_lens,
        output_slots,
        output_ids,
        positions,
        slot_mapping,
        out=out,
    )
    return out


@advance_rows.implementation("cpu", device="cpu", dtypes=(torch.int64,), available=native.cpu_unavailable)
def _cpu(
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
    out = torch.empty_like(sampled_ids) if out is None else out
    native.cpu().advance_rows(
        sampled_ids,
        first_ids,
        page_table,
        page_size,
        num_generated,
        context_lens,
        output_slots,
        output_ids,
        positions,
        slot_mapping,
        out=out,
    )
    return out
