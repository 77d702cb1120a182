"""A token of every image of a batch as one piece of work on fixed memory: captured once, replayed per token.

A step is: each row's last hidden state, its logits, a draw, the draw as the next token, the decoder, the new
hidden state kept. What differs from row to row and from step to step lies in buffers on the device, counters
among them, which the step itself moves on: nothing is read back, and nothing of a step is the host's to know.

Where work is captured as graphs, there is one for every bucket of rows (1, 2, 4, .. the largest batch), and
for each vocabulary to draw from. A batch takes the smallest that holds it, and the rows beyond its own are
padding: rows of no context, which write to no page and to a lane of nobody. Members that change change the
buffers. A batch that draws from both vocabularies runs as the same work, eagerly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from blip3o_rt import ops
from blip3o_rt.ar.kv_cache import Sequence
from blip3o_rt.ar.model import Decoder, DecodeStep
from blip3o_rt.ar.upload import upload
from blip3o_rt.config import ImageTokenConfig
from blip3o_rt.graphs import GraphRunner, RunAhead
from blip3o_rt.params import SamplingParams

TOKENS_AHEAD = 16  # replays that the host may queue ahead of the device: what cancelling has to wait for


@dataclass(eq=False, kw_only=True)
class Row:
    """One image in a batch: how to sample it, its pages, where its results go, and its tokens so far."""

    params: SamplingParams
    prompt_length: int
    sequence: Sequence = field(default_factory=Sequence)
    lane: int = -1
    drawn: int = 0


class Results:
    """Tokens and hidden states of the images in flight, one lane of [tokens_per_image + 1] for each, and one
    lane that is nobody's.

    `tokens` holds the draws, numbered from the first of the vocabulary they were drawn from, -1 where the
    logits were not finite; its last place in a lane stays unused, so that one index serves both.
    """

    def __init__(self, lanes: int, tokens_per_image: int, decoder: Decoder) -> None:
        self.places, width = tokens_per_image + 1, decoder.config.hidden_size
        self.spare_lane = lanes
        shape = (lanes + 1, self.places)
        self.tokens = torch.zeros(shape, dtype=torch.int64, device=decoder.device)
        self.hidden = torch.zeros(*shape, width, dtype=decoder.dtype, device=decoder.device)

    def place(self, lane: int, index: int) -> int:
        """Where a lane's token or hidden state of that number is among those of all lanes."""
        return lane * self.places + index


class TokenSteps:
    """The token steps of one decoder, for batches of up to `max_batch` rows of up to `max_blocks` pages."""

    def __init__(
        self,
        decoder: Decoder,
        image_tokens: ImageTokenConfig,
        runner: GraphRunner,
        *,
        max_batch: int,
        max_blocks: int,
    ) -> None:
        self.decoder = decoder
        self.max_blocks = max_blocks
        self.results = Results(max_batch, image_tokens.tokens_per_image, decoder)
        self.ahead = RunAhead(decoder.device, TOKENS_AHEAD)
        self.vocabularies = {True: image_tokens.image_token_range, False: range(decoder.config.vocab_size)}
        self.logits = torch.empty(
            max_batch * decoder.config.vocab_size, dtype=torch.float32, device=decoder.device
        )
        self._runner = runner
        self._buckets: list[int] = []  # the captured ones
        self._max_batch = max_batch
        self._batches: dict[int, TokenBatch] = {}

    def capture(self) -> None:
        """Capture the step for every bucket, the largest first; where nothing is captured, do nothing."""
        if not self._runner.captures or self._buckets:
            return
        smaller = [
            1 << power for power in range(self._max_batch.bit_length()) if 1 << power < self._max_batch
        ]
        for size in (self._max_batch, *reversed(smaller)):
            self._batch(size).capture(self._runner)
        self._buckets = [*smaller, self._max_batch]

    def lay_out(self, rows: list[Row]) -> TokenBatch:
        """The batch of these rows, which are ordered by vocabulary, image tokens first; its steps go on from
        their tokens so far, until another is laid out."""
        mixed = rows[0].params.image_tokens_only != rows[-1].params.image_tokens_only
        buckets = [] if mixed else self._buckets
        bucket = next((bucket for bucket in buckets if bucket >= len(rows)), None)
        if bucket is None and self._runner.captures:
            which = "pictures that draw from different vocabularies" if mixed else f"{len(rows)} pictures"
            self._runner.note_eager(f"tokens of {which}")
        batch = self._batch(bucket or len(rows))
        batch.lay_out(rows)
        return batch

    def _batch(self, size: int) -> TokenBatch:
        if size not in self._batches:
            self._batches[size] = TokenBatch(size, self)
        return self._batches[size]


@dataclass(frozen=True)
class _Group:
    """Neighbouring rows that sample from the same span of the vocabulary."""

    rows: slice
    vocabulary: range


class TokenBatch:
    """So many rows at fixed addresses, and the step that draws a token of each.

    What interrupts a step leaves the results of the steps before: laid out again, the batch goes on from
    there.
    """

    def __init__(self, size: int, steps: TokenSteps) -> None:
        self._steps, self._decoder, results = steps, steps.decoder, steps.results
        self._size = size

        def column(dtype: torch.dtype, *width: int) -> Tensor:
            return torch.zeros(size, *width, dtype=dtype, device=steps.decoder.device)

        self._temperature, self._top_p = column(torch.float32), column(torch.float32)
        self._top_k = column(torch.int32)
        self._seeds = column(torch.int64)
        self._first_ids = column(torch.int64)
        self._page_table = column(torch.int32, steps.max_blocks)
        self._drawn = column(torch.int32)  # tokens so far; the three that every step counts up
        self._context_lens = column(torch.int32)
        self._places = column(torch.int64)  # of the newest hidden state
        self._positions, self._slots = column(torch.int32), column(torch.int32)
        self._draws, self._token_ids = column(torch.int64), column(torch.int64)
        self._hidden = column(steps.decoder.dtype, steps.decoder.config.hidden_size)
        self._kept_tokens, self._kept_hidden = results.tokens.flatten(), results.hidden.flatten(0, 1)
        self._captured: dict[bool, Callable[[], Tensor]] = {}  # by whether the rows draw image tokens only
        self._run: Callable[[], Tensor] = lambda: self._token_ids
        self._rows = 0
        self.remaining = 0

    def capture(self, runner: GraphRunner) -> None:
        """Capture the step of rows that draw image tokens only, and of rows that draw from everything."""
        for image_only in (False, True):
            self._write([], image_only)
            name = f"the token step of {self._size} rows ({'image tokens' if image_only else 'all tokens'})"
            self._captured[image_only] = runner.capture(name, self._work(self._size if image_only else 0))

    def lay_out(self, rows: list[Row]) -> None:
        """Make these the batch's rows; `remaining` is how many tokens the first to be finished has left."""
        image_rows = sum(row.params.image_tokens_only for row in rows)
        self._rows = len(rows)
        self.remaining = self._steps.results.places - 1 - max(row.drawn for row in rows)
        self._write(rows, image_rows > 0)
        captured = self._captured.get(image_rows > 0) if image_rows in (0, len(rows)) else None
        self._run = captured or self._work(image_rows)

    def step(self) -> Tensor:
        """Draw a token of every row and run it through the decoder; returns vocabulary ids int64 [rows].

        The result is overwritten by the next step. The id of a row whose logits are not finite means nothing:
        the draw is kept as -1.
        """
        self._steps.ahead.step()
        token_ids = self._run()
        self.remaining -= 1
        return token_ids[: self._rows]

    def _work(self, image_rows: int) -> Callable[[], Tensor]:
        """The step where the first `image_rows` rows draw image tokens only."""
        spans = {True: slice(0, image_rows), False: slice(image_rows, self._size)}
        groups = [
            _Group(rows, self._steps.vocabularies[image_only])
            for image_only, rows in spans.items()
            if rows.start < rows.stop
        ]
        return partial(self._draw, groups)

    def _draw(self, groups: list[_Group]) -> Tensor:
        torch.index_select(self._kept_hidden, 0, self._places, out=self._hidden)
        for group in groups:
            rows, width = group.rows, len(group.vocabulary)
            logits = self._steps.logits[: (rows.stop - rows.start) * width].view(-1, width)
            ops.sample_tokens(
                self._decoder.logits(self._hidden[rows], group.vocabulary, out=logits),
                self._temperature[rows],
                self._top_k[rows],
                self._top_p[rows],
                self._seeds[rows],
                self._drawn[rows],
                scratch=self._decoder.scratch,
                out=self._draws[rows],
            )
        ops.advance_rows(
            self._draws,
            self._first_ids,
            self._page_table,
            self._decoder.cache.page_size,
            self._drawn,
            self._context_lens,
            self._places,
            self._kept_tokens,
            self._positions,
            self._slots,
            out=self._token_ids,
        )
        step = DecodeStep(self._positions, self._slots, self._context_lens, self._page_table)
        hidden = self._decoder.decode(self._token_ids, step)
        self._kept_hidden.index_copy_(0, self._places, hidden)
        return self._token_ids

    def _write(self, rows: list[Row], image_only: bool) -> None:
        """Write what a step reads; rows beyond those given are padding, of the kind of the others."""
        results, vocabularies = self._steps.results, self._steps.vocabularies
        padding = self._size - len(rows)
        params = [row.params for row in rows]
        codes, words = len(vocabularies[True]), len(vocabularies[False])
        tables = [row.sequence.page_table for row in rows]
        spare = results.place(results.spare_lane, 0)
        for buffer, values in (
            (self._temperature, [p.temperature for p in params] + [1.0] * padding),
            (self._top_k, [p.top_k_for(codes, words) for p in params] + [1] * padding),
            (self._top_p, [p.top_p for p in params] + [1.0] * padding),
            (self._seeds, [p.seed for p in params] + [0] * padding),
            (self._first_ids, self._first_ids_of(params) + [vocabularies[image_only].start] * padding),
            (self._page_table, [self._padded(table) for table in [*tables, *[[]] * padding]]),
            (self._drawn, [row.drawn for row in rows] + [0] * padding),
            (self._context_lens, [row.prompt_length + row.drawn for row in rows] + [0] * padding),
            (self._places, [results.place(row.lane, row.drawn) for row in rows] + [spare] * padding),
        ):
            upload(values, buffer)

    def _first_ids_of(self, params: list[SamplingParams]) -> list[int]:
        return [self._steps.vocabularies[p.image_tokens_only].start for p in params]

    def _padded(self, table: list[int]) -> list[int]:
        return table + [0] * (self._steps.max_blocks - len(table))
