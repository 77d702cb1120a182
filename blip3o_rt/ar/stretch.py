"""A batch between two changes of its members: what its token steps read, laid out before the first."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from blip3o_rt import ops
from blip3o_rt.ar.kv_cache import PagedKVCache, Sequence
from blip3o_rt.ar.model import Decoder, DecodeStep
from blip3o_rt.config import ImageTokenConfig
from blip3o_rt.params import SamplingParams


@dataclass(eq=False, kw_only=True)
class Row:
    """One image in a batch: how to sample it, its pages, where its results go, and its tokens so far."""

    params: SamplingParams
    prompt_length: int
    sequence: Sequence = field(default_factory=Sequence)
    lane: int = -1
    drawn: int = 0


class Results:
    """Tokens and hidden states of the images in flight, one lane of [tokens_per_image + 1] for each.

    `tokens` holds the draws, numbered from the first of the vocabulary they were drawn from, -1 where the
    logits were not finite; its last place in a lane stays unused, so that one index serves both.
    """

    def __init__(self, lanes: int, tokens_per_image: int, decoder: Decoder) -> None:
        places, width = tokens_per_image + 1, decoder.config.hidden_size
        self.tokens = torch.zeros(lanes, places, dtype=torch.int64, device=decoder.device)
        self.hidden = torch.empty(lanes, places, width, dtype=decoder.dtype, device=decoder.device)


@dataclass(frozen=True)
class _Group:
    """Neighbouring rows that sample from the same span of the vocabulary, and the buffer of their logits."""

    rows: slice
    vocabulary: range
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    seeds: Tensor
    logits: Tensor


class Stretch:
    """The steps of one batch until its first row is finished, each a token of every row.

    `rows` are ordered by vocabulary, image tokens first. Nothing is read back from the device. What
    interrupts a step leaves the results of the steps before: a new stretch goes on from there.
    """

    def __init__(
        self,
        rows: list[Row],
        decoder: Decoder,
        image_tokens: ImageTokenConfig,
        results: Results,
        max_blocks: int,
    ) -> None:
        self._decoder = decoder
        device = decoder.device

        def column(values: list[int], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        count = image_tokens.tokens_per_image
        self.steps = min(count - row.drawn for row in rows)
        ahead = torch.arange(self.steps + 1, dtype=torch.int32, device=device)[:, None]
        self._draws = column([row.drawn for row in rows], torch.int32) + ahead
        self._positions = self._draws + column([row.prompt_length for row in rows], torch.int32)
        self._context_lengths = self._positions + 1
        tables = [row.sequence.block_table for row in rows]
        padded = [table + [0] * (max_blocks - len(table)) for table in tables]
        self._block_table = torch.tensor(padded, dtype=torch.int32, device=device)
        self._slots = _slots(self._positions[: self.steps], self._block_table, decoder.cache)
        self._places = self._draws + column([row.lane * (count + 1) for row in rows], torch.int64)

        self._groups = [
            _group(rows, image_only, decoder, image_tokens)
            for image_only in sorted({row.params.image_tokens_only for row in rows}, reverse=True)
        ]
        starts = [vocabulary_of(row.params, decoder, image_tokens).start for row in rows]
        self._first_ids = column(starts, torch.int64)
        self._drawn = torch.empty(len(rows), dtype=torch.int64, device=device)
        self._tokens = torch.empty(len(rows), dtype=torch.int64, device=device)
        self._all_tokens, self._all_hidden = results.tokens.flatten(), results.hidden.flatten(0, 1)
        self._hidden = self._all_hidden[self._places[0]]
        self.done = 0

    def step(self) -> Tensor:
        """Draw a token of every row and run it through the decoder; returns vocabulary ids int64 [rows].

        The result is overwritten by the next step. The id of a row whose logits are not finite means nothing:
        the draw is kept as -1.
        """
        index = self.done
        for group in self._groups:
            ops.sample_tokens(
                self._decoder.logits(self._hidden[group.rows], group.vocabulary, out=group.logits),
                group.temperature,
                group.top_k,
                group.top_p,
                group.seeds,
                self._draws[index, group.rows],
                out=self._drawn[group.rows],
            )
        torch.add(self._drawn, self._first_ids, out=self._tokens).clamp_(min=0)
        step = DecodeStep(
            self._positions[index], self._slots[index], self._context_lengths[index], self._block_table
        )
        hidden = self._decoder.decode(self._tokens, step)
        self._all_tokens.index_copy_(0, self._places[index], self._drawn)
        self._all_hidden.index_copy_(0, self._places[index + 1], hidden)
        self._hidden = hidden
        self.done += 1
        return self._tokens


def vocabulary_of(params: SamplingParams, decoder: Decoder, image_tokens: ImageTokenConfig) -> range:
    """The vocabulary ids that an image's tokens are drawn from."""
    return image_tokens.image_token_range if params.image_tokens_only else range(decoder.config.vocab_size)


def _group(rows: list[Row], image_only: bool, decoder: Decoder, image_tokens: ImageTokenConfig) -> _Group:
    members = [index for index, row in enumerate(rows) if row.params.image_tokens_only == image_only]
    params = [rows[index].params for index in members]
    codes, words, device = image_tokens.num_image_tokens, decoder.config.vocab_size, decoder.device

    def column(values: list[float] | list[int], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    vocabulary = vocabulary_of(params[0], decoder, image_tokens)
    return _Group(
        slice(members[0], members[-1] + 1),
        vocabulary,
        column([p.temperature for p in params], torch.float32),
        column([p.top_k_for(codes, words) for p in params], torch.int32),
        column([p.top_p for p in params], torch.float32),
        column([p.seed for p in params], torch.int64),
        logits=torch.empty(len(members), len(vocabulary), dtype=torch.float32, device=device),
    )


def _slots(positions: Tensor, block_table: Tensor, cache: PagedKVCache) -> Tensor:
    """Flat cache slots, int32 [steps, rows], of positions int32 [steps, rows]."""
    pages = block_table.gather(1, (positions // cache.page_size).long().T).T
    return (pages * cache.page_size + positions % cache.page_size).contiguous()
