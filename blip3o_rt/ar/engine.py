"""The token engine: prompts in, image tokens and the hidden states that steer the diffusion stage out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from blip3o_rt import ops, trace
from blip3o_rt.ar.kv_cache import DEFAULT_PAGE_SIZE, PagedKVCache, Sequence
from blip3o_rt.ar.model import Decoder, DecodeStep
from blip3o_rt.config import ARConfig, ImageTokenConfig
from blip3o_rt.errors import GenerationError
from blip3o_rt.params import SamplingParams

TokenCallback = Callable[[int, int], None]  # tokens done, tokens in all; raises to cancel


@dataclass(frozen=True)
class TokenPrompt:
    """One prompt and how to sample each of its images.

    `features` [n, hidden], where given, replace the embeddings at `feature_positions` of the prompt.
    """

    ids: list[int]
    samples: list[SamplingParams]
    features: Tensor | None = None
    feature_positions: range = range(0)


@dataclass(frozen=True)
class TokenPlan:
    """One image's tokens [T] (vocabulary ids, int64) and hidden states [T + 1, hidden], or why there are
    none."""

    token_ids: Tensor
    hidden_states: Tensor
    error: GenerationError | None = None


@dataclass
class _Row:
    """One image in flight: which prompt and sample it belongs to, and its place in the cache."""

    prompt_index: int
    sample_index: int
    params: SamplingParams
    prompt_length: int
    sequence: Sequence
    first_hidden: Tensor


@dataclass
class _Group:
    """Rows of a batch that sample from the same span of the vocabulary, and the buffer of their logits."""

    vocabulary: range
    rows: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    seeds: Tensor
    positions: Tensor  # [tokens per image, rows]
    logits: Tensor
    everyone: bool


@dataclass
class _Flight:
    """A batch in the token loop: where each step goes, and what the steps have made so far."""

    steps: list[DecodeStep]
    groups: list[_Group]
    tokens: Tensor  # [tokens per image, images], vocabulary ids
    hidden: Tensor  # [tokens per image + 1, images, hidden]
    failed: Tensor  # [images]


class TokenEngine:
    """Runs up to `max_batch` images at a time over one paged cache allocated at construction.

    `max_prompt_tokens` bounds a prompt with its template and reference tokens. Every image takes
    `image_tokens.tokens_per_image` decode steps; results do not depend on which images share a batch.
    """

    def __init__(
        self,
        config: ARConfig,
        image_tokens: ImageTokenConfig,
        weights: Mapping[str, Tensor],
        *,
        max_batch: int,
        max_prompt_tokens: int,
        page_size: int = DEFAULT_PAGE_SIZE,
    ) -> None:
        embedding = weights["embed_tokens.weight"]
        self.image_tokens = image_tokens
        self.max_batch = max_batch
        self._max_blocks = -(-(max_prompt_tokens + image_tokens.tokens_per_image) // page_size)
        self.cache = PagedKVCache(
            config,
            (max_batch + 1) * self._max_blocks,  # one more: a prompt's own pages while its images hold theirs
            page_size=page_size,
            dtype=embedding.dtype,
            device=embedding.device,
        )
        self.decoder = Decoder(config, weights, self.cache)

    def generate(
        self, prompts: list[TokenPrompt], callback: TokenCallback | None = None
    ) -> list[list[TokenPlan]]:
        """Sample every image of every prompt; `result[p][s]` belongs to `prompts[p].samples[s]`.

        An image whose logits are not finite gets a plan with an error; the others are unaffected. The
        callback runs between tokens; what it raises ends the call and returns all pages.
        """
        wanted = [(p, s) for p, prompt in enumerate(prompts) for s in range(len(prompt.samples))]
        tokens = self.image_tokens.tokens_per_image
        results: dict[tuple[int, int], TokenPlan] = {}
        for start in range(0, len(wanted), self.max_batch):
            wave = wanted[start : start + self.max_batch]
            done = start * tokens
            report = None
            if callback is not None:
                report = _scaled(callback, done, len(wave), len(wanted) * tokens)
            results.update(self._run_wave(prompts, wave, report))
        return [[results[p, s] for s in range(len(prompt.samples))] for p, prompt in enumerate(prompts)]

    def stream(self, prompt: TokenPrompt) -> Iterator[Tensor]:
        """Sample the images of one prompt, at most `max_batch`, token by token.

        Each item is int64 [images], vocabulary ids, 0 for an image that failed; a token is drawn and run
        through the decoder when its item is asked for. Closing the iterator returns its pages.
        """
        rows = self._admit(prompt, 0, list(range(len(prompt.samples))))
        try:
            flight = self._launch(rows)
            for index in range(self.image_tokens.tokens_per_image):
                self._step(flight, index)
                yield flight.tokens[index]
        finally:
            for row in rows:
                self.cache.release(row.sequence)

    def replay(self, prompt: TokenPrompt, token_ids: Tensor) -> TokenPlan:
        """Hidden states of given tokens [T] (teacher forcing), in one pass over prompt and tokens."""
        sequence = Sequence()
        device = self.decoder.device
        token_ids = token_ids.to(device)
        try:
            self.cache.reserve(sequence, len(prompt.ids) + token_ids.shape[0])
            embeddings = torch.cat([self._embed_prompt(prompt), self.decoder.embed(token_ids)])
            hidden = self.decoder.prefill(embeddings, sequence)
        finally:
            self.cache.release(sequence)
        return TokenPlan(token_ids, hidden[len(prompt.ids) - 1 :].clone())

    def _run_wave(
        self, prompts: list[TokenPrompt], wave: list[tuple[int, int]], report: Callable[[int], None] | None
    ) -> dict[tuple[int, int], TokenPlan]:
        rows: list[_Row] = []
        try:
            for prompt_index in dict.fromkeys(p for p, _ in wave):
                samples = [s for p, s in wave if p == prompt_index]
                rows += self._admit(prompts[prompt_index], prompt_index, samples)
            plans = self._decode(rows, report)
        finally:
            for row in rows:
                self.cache.release(row.sequence)
        return {(row.prompt_index, row.sample_index): plan for row, plan in zip(rows, plans, strict=True)}

    def _admit(self, prompt: TokenPrompt, prompt_index: int, samples: list[int]) -> list[_Row]:
        """Prefill the prompt once and fork its pages for each of its images."""
        parent = Sequence()
        rows: list[_Row] = []
        try:
            self.cache.reserve(parent, len(prompt.ids))
            hidden = self.decoder.prefill(self._embed_prompt(prompt), parent)
            for sample in samples:
                child = self.cache.fork(parent)
                rows.append(
                    _Row(prompt_index, sample, prompt.samples[sample], len(prompt.ids), child, hidden[-1])
                )
                self.cache.reserve(child, len(prompt.ids) + self.image_tokens.tokens_per_image)
        except BaseException:
            for row in rows:
                self.cache.release(row.sequence)
            raise
        finally:
            self.cache.release(parent)
        return rows

    def _decode(self, rows: list[_Row], report: Callable[[int], None] | None) -> list[TokenPlan]:
        """The token loop. Nothing is read back from the device before the last token."""
        flight, count = self._launch(rows), self.image_tokens.tokens_per_image
        for index in range(count):
            if report is not None:
                report(index)
            self._step(flight, index)
        if report is not None:
            report(count)
        return [
            self._plan(flight.tokens[:, row], flight.hidden[:, row], bool(flight.failed[row]))
            for row in range(len(rows))
        ]

    def _launch(self, rows: list[_Row]) -> _Flight:
        """Everything that the steps of the token loop read and write, laid out before it starts."""
        device, count, batch = self.decoder.device, self.image_tokens.tokens_per_image, len(rows)
        width = self.decoder.config.hidden_size
        hidden = torch.empty(count + 1, batch, width, dtype=self.decoder.dtype, device=device)
        hidden[0] = torch.stack([row.first_hidden for row in rows])
        return _Flight(
            self._schedule(rows),
            self._groups(rows),
            tokens=torch.empty(count, batch, dtype=torch.int64, device=device),
            hidden=hidden,
            failed=torch.zeros(batch, dtype=torch.bool, device=device),
        )

    def _step(self, flight: _Flight, index: int) -> None:
        """Draw token number `index` of every image and run it through the decoder."""
        tokens, hidden = flight.tokens[index], flight.hidden
        with trace.span("ar.token", index):
            self._sample(hidden[index], flight.groups, index, tokens)
            flight.failed |= tokens < 0
            tokens.clamp_(min=0)
            hidden[index + 1].copy_(self.decoder.decode(tokens, flight.steps[index]))

    def _sample(self, hidden: Tensor, groups: list[_Group], index: int, out: Tensor) -> None:
        """Write one token per row, or -1 where a row's logits are not finite."""
        for group in groups:
            states = hidden if group.everyone else hidden[group.rows]
            drawn = ops.sample_tokens(
                self.decoder.logits(states, group.vocabulary, out=group.logits),
                group.temperature,
                group.top_k,
                group.top_p,
                group.seeds,
                group.positions[index],
            )
            out[group.rows] = torch.where(drawn < 0, drawn, drawn + group.vocabulary.start)

    def _schedule(self, rows: list[_Row]) -> list[DecodeStep]:
        """Positions, slots and context lengths of every step, laid out before the loop starts."""
        count = self.image_tokens.tokens_per_image

        def table(values: list[list[int]]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=self.decoder.device)

        starts = [row.prompt_length for row in rows]
        positions = table([[start + step for start in starts] for step in range(count)])
        slots = table(
            [self.cache.slots(row.sequence, row.prompt_length, row.prompt_length + count) for row in rows]
        )
        padding = [[0] * (self._max_blocks - len(row.sequence.block_table)) for row in rows]
        blocks = table([row.sequence.block_table + pad for row, pad in zip(rows, padding, strict=True)])
        slots = slots.T.contiguous()
        context_lengths = positions + 1
        return [
            DecodeStep(positions[step], slots[step], context_lengths[step], blocks) for step in range(count)
        ]

    def _groups(self, rows: list[_Row]) -> list[_Group]:
        whole = range(self.decoder.config.vocab_size)
        groups = []
        for image_only, vocabulary in ((True, self.image_tokens.image_token_range), (False, whole)):
            members = [i for i, row in enumerate(rows) if row.params.image_tokens_only == image_only]
            if members:
                groups.append(self._group(rows, members, vocabulary))
        return groups

    def _group(self, rows: list[_Row], members: list[int], vocabulary: range) -> _Group:
        params = [rows[i].params for i in members]
        codes, words = self.image_tokens.num_image_tokens, self.decoder.config.vocab_size

        def column(values: list[float] | list[int], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=self.decoder.device)

        count, device = self.image_tokens.tokens_per_image, self.decoder.device
        positions = torch.arange(count, dtype=torch.int32, device=device)[:, None]
        return _Group(
            vocabulary,
            column(members, torch.int64),
            column([p.temperature for p in params], torch.float32),
            column([p.top_k_for(codes, words) for p in params], torch.int32),
            column([p.top_p for p in params], torch.float32),
            column([p.seed for p in params], torch.int64),
            positions=positions.repeat(1, len(members)),
            logits=torch.empty(len(members), len(vocabulary), dtype=torch.float32, device=device),
            everyone=len(members) == len(rows),
        )

    def _embed_prompt(self, prompt: TokenPrompt) -> Tensor:
        ids = torch.tensor(prompt.ids, dtype=torch.int64, device=self.decoder.device)
        embeddings = self.decoder.embed(ids)
        if prompt.features is not None:
            span = prompt.feature_positions
            embeddings[span.start : span.stop] = prompt.features.to(embeddings)
        return embeddings

    def _plan(self, token_ids: Tensor, hidden_states: Tensor, failed: bool) -> TokenPlan:
        error = None
        if failed:
            error = GenerationError(
                "the decoder's logits are not finite: "
                "the checkpoint's weights are damaged or overflow in this dtype"
            )
        return TokenPlan(token_ids.contiguous(), hidden_states.contiguous(), error)


def _scaled(callback: TokenCallback, done: int, width: int, total: int) -> Callable[[int], None]:
    """Report a wave's steps as tokens of the whole call."""

    def report(step: int) -> None:
        callback(done + step * width, total)

    return report
