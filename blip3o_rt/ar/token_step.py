"""A pass of the token batch as one piece of work on fixed memory: captured once, replayed again and again.

Each image of a batch has a window of rows. The first row reads the newest token that is kept, the others read
guesses of the tokens that follow. A pass is: the logits of the hidden states that the last pass left, a draw
of each row, the draws that are right kept and the windows moved on behind them, the decoder on the new rows,
their hidden states written. A row's draw is right where every row before it drew what the next one had read
(advance_windows). A hidden state or a key that turns out wrong is written over by a later pass. So a window
of one row draws one token a pass, and a longer one as many as are right, the same tokens in any case.

What differs from row to row and from pass to pass lies in buffers on the device, counters among them, which
the pass itself moves on: nothing is read back within it.

Where work is captured as graphs, there is one for every bucket of rows (1, 2, 4, .. the most), for each
vocabulary to draw from, and for windows of one row and of several. A batch takes the smallest that holds it,
and the rows beyond its own are padding rows: context length 0, no KV page, output to the dummy slot.
A batch that draws from both vocabularies runs as the same work, eagerly.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, product
from typing import NamedTuple

import torch
from torch import Tensor

from blip3o_rt import ops
from blip3o_rt.ar.draft_window import Agreement
from blip3o_rt.ar.kv_cache import Sequence
from blip3o_rt.ar.model import Decoder, DecodeStep
from blip3o_rt.ar.upload import upload
from blip3o_rt.config import ImageTokenConfig
from blip3o_rt.graphs import GraphRunner, RunAhead, dependent_launches
from blip3o_rt.params import SamplingParams

PASSES_AHEAD = 16  # replays that the host may queue ahead of the device: what cancelling has to wait for
WINDOWED_PASSES_AHEAD = 4  # of longer windows: how late the host may see that an image is done


@dataclass(eq=False, kw_only=True)
class Member:
    """One image in a batch: how to sample it, its pages, where its results go, and its tokens so far.

    window: rows that the next pass gives it. decoded: rows from its newest token on whose hidden states the
    last pass left. draft_window: the most rows it may get, None where they are chosen by what they gain.
    """

    params: SamplingParams
    prompt_length: int
    sequence: Sequence = field(default_factory=Sequence)
    slot: int = -1
    num_generated: int = 0
    window: int = 1
    decoded: int = 1
    draft_window: int | None = 1
    agreement: Agreement = field(default_factory=Agreement)


class Row(NamedTuple):
    """What a pass reads of one row. The defaults are those of padding."""

    first_id: int  # of the vocabulary that is drawn from
    page_table: list[int]
    output_slot: int
    number: int = 0  # of the token that the row draws
    context_len: int = 0
    temperature: float = 1.0
    top_k: int = 1
    top_p: float = 1.0
    seed: int = 0


class Results:
    """Tokens and hidden states of the images in flight, in output slots of [tokens_per_image + 1].

    One more slot is the dummy slot.

    `tokens` holds the draws, numbered from the first of the vocabulary they were drawn from, -1 where the
    logits were not finite, and behind the draws guesses. The last element of a slot stays unused there, so
    that one index serves both.
    """

    def __init__(self, slots: int, tokens_per_image: int, decoder: Decoder) -> None:
        self.size, width = tokens_per_image + 1, decoder.config.hidden_size
        shape = (slots + 1, self.size)
        self.tokens = torch.zeros(shape, dtype=torch.int64, device=decoder.device)
        self.hidden = torch.zeros(*shape, width, dtype=decoder.dtype, device=decoder.device)

    def index(self, slot: int, number: int) -> int:
        """Where a slot's token or hidden state of that number is among those of all slots."""
        return slot * self.size + number

    @property
    def dummy(self) -> int:
        """The index that rows of no image write to."""
        return self.tokens.numel() - 1


class TokenSteps:
    """The passes of one decoder over batches of up to `max_rows` rows, with up to `max_pages` pages each."""

    def __init__(
        self,
        decoder: Decoder,
        image_tokens: ImageTokenConfig,
        runner: GraphRunner,
        *,
        max_batch: int,
        max_rows: int,
        max_pages: int,
    ) -> None:
        self.decoder = decoder
        self.max_pages = max_pages
        self.tokens_per_image = image_tokens.tokens_per_image
        self.grid_width = math.isqrt(self.tokens_per_image)
        self.results = Results(max_batch, self.tokens_per_image, decoder)
        self.vocabularies = {True: image_tokens.image_token_range, False: range(decoder.config.vocab_size)}
        self.logits = torch.empty(
            max_rows * decoder.config.vocab_size, dtype=torch.float32, device=decoder.device
        )
        self._runner = runner
        self._max_batch, self._max_rows = max_batch, max_rows
        self._buckets: list[int] = []  # the captured ones
        self._batches: dict[int, TokenBatch] = {}
        self._current: TokenBatch | None = None

    def capture(self) -> None:
        """Capture the pass for every bucket, the largest first; where nothing is captured, do nothing."""
        if not self._runner.captures or self._buckets:
            return
        sizes = {1 << power for power in range(self._max_rows.bit_length())} | {self._max_batch}
        self._buckets = sorted({size for size in sizes if size < self._max_rows} | {self._max_rows})
        single = next(size for size in self._buckets if size >= self._max_batch)
        for size in reversed(self._buckets):
            kinds = [windowed for windowed in (False, True) if size > 1 or not windowed]
            self._batch(size).capture(self._runner, kinds if size <= single else [True])

    def lay_out(self, members: list[Member]) -> TokenBatch:
        """The batch of these members, which go on from their tokens so far until another is laid out.

        They are ordered by vocabulary, image tokens first.
        """
        if self._current is not None:
            self._current.settle()
        rows = sum(member.window for member in members)
        mixed = members[0].params.image_tokens_only != members[-1].params.image_tokens_only
        buckets = [] if mixed else self._buckets
        bucket = next((bucket for bucket in buckets if bucket >= rows), None)
        if bucket is None and self._runner.captures:
            which = "images that draw from different vocabularies" if mixed else f"{rows} rows"
            self._runner.note_eager(f"tokens of {which}")
        self._current = self._batch(bucket or rows)
        self._current.lay_out(members)
        return self._current

    def _batch(self, size: int) -> TokenBatch:
        if size not in self._batches:
            self._batches[size] = TokenBatch(size, self)
        return self._batches[size]


class TokenBatch:
    """So many rows at fixed addresses, and the pass that draws tokens of each image among them.

    What interrupts a pass leaves the results of the passes before: laid out again, the batch goes on from
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
        self._cu_rows = torch.zeros(size + 1, dtype=torch.int32, device=steps.decoder.device)
        self._num_generated = column(torch.int32)  # the number of the token that a row draws
        self._step = DecodeStep(
            positions=column(torch.int32),
            slot_mapping=column(torch.int32),
            context_lens=column(torch.int32),
            page_table=column(torch.int32, steps.max_pages),
            output_slots=column(torch.int64),  # of that token and of the hidden state it is drawn from
        )
        self._sampled_ids, self._token_ids = column(torch.int64), column(torch.int64)
        width = steps.decoder.config.hidden_size
        self._embedded, self._hidden = (column(steps.decoder.dtype, width) for _ in range(2))
        self._kept_tokens, self._kept_hidden = results.tokens.flatten(), results.hidden.flatten(0, 1)
        self._captured: dict[tuple[bool, bool], Callable[[], Tensor]] = {}  # image tokens only, windowed
        self._run: Callable[[], Tensor] = lambda: self._token_ids
        self._members: list[Member] = []
        self._windows: list[int] = []  # of the members as they were laid out
        self._rows = 0
        self._windowed = False
        self._counts = LateCounts(self._num_generated)
        self._interrupted = False
        passes_ahead = {False: PASSES_AHEAD, True: WINDOWED_PASSES_AHEAD}
        self._ahead = {windowed: RunAhead(results.tokens.device, n) for windowed, n in passes_ahead.items()}

    def capture(self, runner: GraphRunner, kinds: list[bool]) -> None:
        """Capture a pass over each vocabulary, for windows of one row (False in `kinds`) or several."""
        for image_only, windowed in product((False, True), kinds):
            self._write([], image_only)
            vocabulary = "image tokens" if image_only else "all tokens"
            name = f"the token step of {self._size} rows ({vocabulary}{', windows' if windowed else ''})"
            work = self._work(self._size if image_only else 0, windowed)
            self._captured[image_only, windowed] = runner.capture(name, work)

    def lay_out(self, members: list[Member]) -> None:
        """Make these the batch's members."""
        image_rows = sum(member.window for member in members if member.params.image_tokens_only)
        self._members = members
        self._windows = [member.window for member in members]
        self._rows = sum(self._windows)
        self._windowed = self._rows > len(members)
        self._write(members, image_rows > 0)
        mixed = image_rows not in (0, self._rows)
        captured = None if mixed else self._captured.get((image_rows > 0, self._windowed))
        self._run = captured or self._work(image_rows, self._windowed)

    def step(self) -> Tensor:
        """Draw at least one token of every member and run its window through the decoder.

        A member's `num_generated` counts what is kept; on a GPU that of longer windows lags a few passes.

        Returns:
            The vocabulary ids that the rows read, int64 [rows]; overwritten by the next step. The id of a row
            whose logits are not finite means nothing: the draw is kept as -1.
        """
        self._ahead[self._windowed].step()
        offered = [member.decoded for member in self._members]
        self._interrupted = True
        for member in self._members:
            member.decoded = 1  # all that is sure where the pass is interrupted
        token_ids = self._run()
        if self._windowed:
            self._count(self._counts.after_a_pass(), offered)
        else:
            for member in self._members:
                member.num_generated += 1
        self._interrupted = False
        return token_ids[: self._rows]

    def settle(self) -> None:
        """Wait until the members' counts are those of the last pass."""
        self._count(self._counts.newest(), self._windows)
        if self._interrupted:  # guesses may have moved on without their hidden states
            for member in self._members:
                member.decoded = 1
            self._interrupted = False

    def _count(self, counts: list[int] | None, offered: list[int]) -> None:
        """Take over what the device has counted since the last time, when so many rows were offered."""
        if counts is None:
            return
        row = 0
        for member, window, rows in zip(self._members, self._windows, offered, strict=True):
            left = self._steps.tokens_per_image - member.num_generated
            member.agreement.note(counts[row] - member.num_generated, min(rows, left))
            member.num_generated = counts[row]
            member.decoded = min(window, self._steps.tokens_per_image - member.num_generated + 1)
            row += window

    def _work(self, image_rows: int, windowed: bool) -> Callable[[], Tensor]:
        """The pass where the first `image_rows` rows draw image tokens only."""
        spans = {True: slice(0, image_rows), False: slice(image_rows, self._size)}
        vocabularies = self._steps.vocabularies
        groups = [(rows, vocabularies[only]) for only, rows in spans.items() if rows.start < rows.stop]
        return partial(self._pass, groups, replace(self._step, windowed=windowed))

    def _pass(self, groups: list[tuple[slice, range]], step: DecodeStep) -> Tensor:
        """A pass of rows that draw, a group of neighbors each, from a span of the vocabulary."""
        with dependent_launches(self._decoder.device):
            for rows, vocabulary in groups:
                count, width = rows.stop - rows.start, len(vocabulary)
                logits = self._steps.logits[: count * width].view(count, width)
                ops.sample_tokens(
                    self._decoder.logits(self._hidden[rows], vocabulary, out=logits),
                    self._temperature[rows],
                    self._top_k[rows],
                    self._top_p[rows],
                    self._seeds[rows],
                    self._num_generated[rows],
                    scratch=self._decoder.scratch,
                    out=self._sampled_ids[rows],
                )
            ops.advance_windows(
                self._sampled_ids,
                self._cu_rows,
                self._first_ids,
                step.page_table,
                self._decoder.cache.page_size,
                self._steps.tokens_per_image,
                self._steps.grid_width,
                self._num_generated,
                step.context_lens,
                step.output_slots,
                self._kept_tokens,
                step.positions,
                step.slot_mapping,
                embedding=self._decoder.embedding,
                embedded=self._embedded,
                out=self._token_ids,
            )
            self._decoder.decode(self._embedded, step, self._kept_hidden, out=self._hidden)
            return self._token_ids

    def _write(self, members: list[Member], image_only: bool) -> None:
        """Write what a pass reads; rows beyond those of the members are padding of the same kind."""
        columns = {
            "first_id": self._first_ids,
            "page_table": self._step.page_table,
            "output_slot": self._step.output_slots,
            "number": self._num_generated,
            "context_len": self._step.context_lens,
            "temperature": self._temperature,
            "top_k": self._top_k,
            "top_p": self._top_p,
            "seed": self._seeds,
        }
        padding = Row(self._steps.vocabularies[image_only].start, self._padded([]), self._steps.results.dummy)
        rows = [self._row(member, row) for member in members for row in range(member.window)]
        rows += [padding] * (self._size - len(rows))
        for name, values in zip(Row._fields, zip(*rows, strict=True), strict=True):
            upload([*values], columns[name])
        bounds = list(accumulate((member.window for member in members), initial=0))
        upload(bounds + bounds[-1:] * (self._size - len(members)), self._cu_rows)
        torch.index_select(self._kept_hidden, 0, self._step.output_slots, out=self._hidden)

    def _row(self, member: Member, row: int) -> Row:
        """What a pass reads of a row of a window.

        Number, context length and output slot are those of padding where the last pass left no hidden state.
        """
        params, results, vocabularies = member.params, self._steps.results, self._steps.vocabularies
        number = member.num_generated + row
        found = Row(
            first_id=vocabularies[params.image_tokens_only].start,
            page_table=self._padded(member.sequence.page_table),
            output_slot=results.dummy,
            temperature=params.temperature,
            top_k=params.top_k_for(len(vocabularies[True]), len(vocabularies[False])),
            top_p=params.top_p,
            seed=params.seed,
        )
        if row >= member.decoded or number > self._steps.tokens_per_image:
            return found
        slot, length = results.index(member.slot, number), member.prompt_length + number
        return found._replace(output_slot=slot, number=number, context_len=length)

    def _padded(self, table: list[int]) -> list[int]:
        return table + [0] * (self._steps.max_pages - len(table))


class LateCounts:
    """Counters on a device, read without waiting for the passes that are still queued."""

    def __init__(self, counters: Tensor) -> None:
        self._counters = counters
        self._copies: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    def after_a_pass(self) -> list[int] | None:
        """What the newest pass that is over has counted; None where none was since the last call."""
        if not self._counters.is_cuda:
            return self._counters.tolist()
        copy = torch.empty(self._counters.shape, dtype=self._counters.dtype, pin_memory=True)
        copy.copy_(self._counters, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._counters.device))
        self._copies.append((copy, event))
        newest = None
        while self._copies and self._copies[0][1].query():
            newest, _ = self._copies.popleft()
        return None if newest is None else newest.tolist()

    def newest(self) -> list[int] | None:
        """What the last pass has counted, which is waited for; None where that is known."""
        if not self._copies:
            return None
        copy, event = self._copies[-1]
        event.synchronize()
        self._copies.clear()
        return copy.tolist()
