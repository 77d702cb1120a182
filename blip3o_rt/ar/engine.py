"""The token engine: prompts in, image tokens and the hidden states that steer the diffusion stage out.

    request = engine.submit(TokenPrompt(ids, [SamplingParams(seed=7), SamplingParams(seed=8)]))
    while not request.done:
        engine.step()  # at least one token of every image that runs, of this request and of all others
    first, second = request.plans

Images join and leave between passes. An image joins when there is a row for it and every page that it can
ever need is free; how long it gets is known, so nothing that runs is ever put back. Only images that run hold
pages, and the one that has waited longest joins first: none overtakes it, and it joins at the latest when all
that run have left. An image's result does not depend on the others, bit for bit, where the ops keep their
contract that a row does not (row_linear, decode_attention, sample_tokens). Nor does it depend on how many
rows an image gets in a pass (draft_window): guesses make it quicker, never different.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import itemgetter

import torch
from torch import Tensor

from blip3o_rt import trace
from blip3o_rt.ar.draft_window import DraftWindows
from blip3o_rt.ar.kv_cache import DEFAULT_PAGE_SIZE, PagedKVCache, Sequence
from blip3o_rt.ar.model import PREFILL_CHUNK, Decoder
from blip3o_rt.ar.token_step import Member, TokenBatch, TokenSteps
from blip3o_rt.ar.upload import uploaded
from blip3o_rt.config import ARConfig, ImageTokenConfig
from blip3o_rt.errors import GenerationError, ParameterError, PromptError
from blip3o_rt.graphs import GraphRunner
from blip3o_rt.params import MAX_DRAFT_WINDOW, SamplingParams

TokenCallback = Callable[[int, int], None]  # tokens done, tokens in all; raises to cancel


@dataclass(frozen=True)
class TokenPrompt:
    """One prompt and how to sample each of its images.

    `features` [n, hidden], where given, replace the embeddings at `feature_positions` of the prompt.
    `draft_window`: the most rows an image gets in a pass, 1 to 16, or None where the engine chooses.
    """

    ids: list[int]
    samples: list[SamplingParams]
    features: Tensor | None = None
    feature_positions: range = range(0)
    draft_window: int | None = 1


@dataclass(frozen=True)
class TokenPlan:
    """One image's tokens int64 [T] (vocabulary ids) and hidden states [T + 1, hidden], or its error."""

    token_ids: Tensor
    hidden_states: Tensor
    error: GenerationError | None = None


@dataclass(eq=False)
class Request:
    """What `submit` hands out: `plans[s]` is the plan of `prompt.samples[s]`, None until it is finished."""

    prompt: TokenPrompt
    plans: list[TokenPlan | None]
    tokens_drawn: int = 0
    passes: int = 0  # of its images over the decoder, which draw a token or more each
    cancelled: bool = False

    @property
    def done(self) -> bool:
        """Whether nothing more will come of it: every plan is there, or it was cancelled."""
        return self.cancelled or None not in self.plans

    @property
    def finished(self) -> list[TokenPlan]:
        """The plans that are there, in the order of the samples."""
        return [plan for plan in self.plans if plan is not None]


@dataclass(eq=False, kw_only=True)
class _Image(Member):
    """One image of a request; it holds an output slot and pages from joining to leaving."""

    request: Request
    sample: int


class TokenEngine:
    """Draws up to `max_batch` images at a time over a paged cache, both allocated at construction.

    `max_prompt_tokens` bounds a prompt with its template and reference tokens. `num_pages`, where given, is a
    cache smaller than `max_batch` images of the longest prompt take: then pages limit who joins, not rows.
    `runner` captures the token step; None is that of the weights' device.
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
        num_pages: int | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
        runner: GraphRunner | None = None,
    ) -> None:
        activations = weights["norm.weight"]  # whose dtype they have
        self.image_tokens = image_tokens
        self.max_batch = max_batch
        self._max_prompt_tokens = max_prompt_tokens
        self._max_pages = -(-(max_prompt_tokens + image_tokens.tokens_per_image) // page_size)
        num_pages = max_batch * self._max_pages if num_pages is None else num_pages
        if num_pages < self._max_pages:
            raise ParameterError(
                f"num_pages is {num_pages}: accepted is at least {self._max_pages}, which one image takes"
            )
        self.cache = PagedKVCache(
            config, num_pages, page_size=page_size, dtype=activations.dtype, device=activations.device
        )
        max_rows = max(max_batch, MAX_DRAFT_WINDOW)
        self.decoder = Decoder(config, weights, self.cache, max_rows=max_rows, prefill_chunk=prefill_chunk)
        self._token_steps = TokenSteps(
            self.decoder,
            image_tokens,
            runner or GraphRunner.of(self.decoder.device),
            max_batch=max_batch,
            max_rows=max_rows,
            max_pages=self._max_pages,
        )
        self._windows = DraftWindows(max_rows, image_tokens.tokens_per_image)
        self._results = self._token_steps.results
        self._free_slots = list(range(max_batch))
        self._waiting: deque[_Image] = deque()
        self._running: list[_Image] = []  # in the order they joined
        self._batch: TokenBatch | None = None  # of those who run, until one joins or leaves

    def capture(self) -> None:
        """Capture the token step as graphs, where the device has them. Call it before the first request."""
        self._token_steps.capture()

    def submit(self, prompt: TokenPrompt) -> Request:
        """Put the images of a prompt at the end of the queue, any number of them.

        Raises PromptError or ParameterError for what could never run.
        """
        self._check(prompt)
        request = Request(prompt, [None] * len(prompt.samples))
        self._waiting.extend(
            _Image(
                params=params,
                prompt_length=len(prompt.ids),
                draft_window=prompt.draft_window,
                request=request,
                sample=sample,
            )
            for sample, params in enumerate(prompt.samples)
        )
        return request

    def cancel(self, request: Request) -> None:
        """Take a request's images out of the queue and the batch; those that are finished stay finished.

        May be called between any two steps; for a request that is done it does nothing.
        """
        request.cancelled = request.cancelled or not request.done
        self._waiting = deque(image for image in self._waiting if image.request is not request)
        for image in [image for image in self._running if image.request is request]:
            self._leave(image)

    @property
    def busy(self) -> bool:
        """Whether an image runs or waits."""
        return bool(self._running or self._waiting)

    def step(self) -> Tensor:
        """Let in who fits, then run one pass, which draws at least one token of every image that runs.

        An image whose logits are not finite ends with an error in its plan; the others are unaffected. What
        reading a prompt raises cancels its request and is raised here; the others go on. What interrupts
        collecting a finished image is raised here too, and the next step collects it.

        Returns:
            The vocabulary ids that the rows of the pass read, int64 [rows], by vocabulary and in the order
            the images joined; overwritten by the next step.
        """
        self._retire()
        self._admit()
        if not self._running:
            return self._results.tokens.new_empty(0)
        batch, self._batch = self._batch or self._lay_out(), None  # not kept where its step is interrupted
        before = [image.num_generated for image in self._running]
        begun = time.perf_counter()
        with trace.span("ar.token", before[0]):
            tokens = batch.step()
        if not tokens.is_cuda:  # elsewhere the host does not see how long a pass takes
            self._windows.times.note(len(tokens), time.perf_counter() - begun)
        for image, number in zip(self._running, before, strict=True):
            image.request.tokens_drawn += image.num_generated - number
            image.request.passes += 1
        if any(self._finished(image) for image in self._running):
            self._retire()
        elif not self._windows.change(self._running):
            self._batch = batch
        return tokens

    def generate(
        self, prompts: list[TokenPrompt], callback: TokenCallback | None = None
    ) -> list[list[TokenPlan]]:
        """The plans of `run`; `result[p][s]` belongs to `prompts[p].samples[s]`."""
        return [request.finished for request in self.run(prompts, callback)]

    def run(self, prompts: list[TokenPrompt], callback: TokenCallback | None = None) -> list[Request]:
        """Sample every image of every prompt; returns a request for each, which is done.

        An image whose logits are not finite gets a plan with an error; the others are unaffected. The
        callback runs between tokens; what it raises ends the call and returns all pages.
        """
        requests: list[Request] = []
        total = self.image_tokens.tokens_per_image * sum(len(prompt.samples) for prompt in prompts)
        try:
            for prompt in prompts:
                requests.append(self.submit(prompt))
            while True:
                if callback is not None:
                    callback(sum(request.tokens_drawn for request in requests), total)
                if all(request.done for request in requests):
                    break
                self.step()
        finally:
            for request in requests:
                self.cancel(request)
        return requests

    def replay(self, prompt: TokenPrompt, token_ids: Tensor) -> TokenPlan:
        """Hidden states of given tokens [T] (teacher forcing), in one pass over prompt and tokens.

        Raises InsufficientMemoryError where images in flight hold the pages it takes.
        """
        sequence = Sequence()
        token_ids = token_ids.to(self.decoder.device)
        try:
            self.cache.reserve(sequence, len(prompt.ids) + token_ids.shape[0])
            embeddings = torch.cat([self._embed_prompt(prompt), self.decoder.embed(token_ids)])
            hidden = self.decoder.prefill(embeddings, sequence)
        finally:
            self.cache.release(sequence)
        return TokenPlan(token_ids, hidden[len(prompt.ids) - 1 :].clone())

    def _check(self, prompt: TokenPrompt) -> None:
        if not 1 <= len(prompt.ids) <= self._max_prompt_tokens:
            raise PromptError(
                f"the prompt is {len(prompt.ids)} tokens long: accepted is 1 to {self._max_prompt_tokens}"
            )
        vocab_size = self.decoder.config.vocab_size
        if min(prompt.ids) < 0 or max(prompt.ids) >= vocab_size:
            raise PromptError(f"the prompt has ids outside the vocabulary: accepted is 0 to {vocab_size - 1}")
        span, width = prompt.feature_positions, self.decoder.config.hidden_size
        if prompt.features is not None and (
            tuple(prompt.features.shape) != (len(span), width)
            or span.step != 1
            or span.stop > len(prompt.ids)
        ):
            raise PromptError(
                f"features {list(prompt.features.shape)} do not fit {span} of {len(prompt.ids)} ids: "
                f"accepted is a row of {width} for every position"
            )
        for params in prompt.samples:
            params.top_k_for(self.image_tokens.num_image_tokens, vocab_size)

    def _admit(self) -> None:
        """Let images join from the head of the queue while there is room for the next."""
        while self._waiting and self._free_slots:
            image = self._waiting[0]
            prompt = image.request.prompt
            shared, donor = self._longest_prefix(prompt)
            pages = self.cache.pages_for(len(prompt.ids) + self.image_tokens.tokens_per_image)
            if pages - shared // self.cache.page_size > self.cache.free_pages:
                return
            self._waiting.popleft()
            self._running.append(image)
            try:
                self._join(image, donor, shared)
            except BaseException:
                self.cancel(image.request)
                raise

    def _longest_prefix(self, prompt: TokenPrompt) -> tuple[int, _Image | None]:
        """How many of the prompt's positions some running image has in its pages, and the first with most."""
        chunk = self.decoder.prefill_chunk
        shared = [(_shared_positions(i.request.prompt, prompt, chunk), i) for i in self._running]
        return max(shared, key=itemgetter(0), default=(0, None))

    def _join(self, image: _Image, donor: _Image | None, shared: int) -> None:
        """Give an image its output slot and pages, and read what no other has read of its prompt."""
        prompt = image.request.prompt
        self._batch = None
        self._windows.begin(image)
        image.slot = self._free_slots.pop()
        if donor is not None:
            image.sequence = self.cache.fork(donor.sequence, shared)
        self.cache.reserve(image.sequence, len(prompt.ids) + self.image_tokens.tokens_per_image)
        if donor is not None and shared == len(prompt.ids):
            first_hidden = self._results.hidden[donor.slot, 0]
        else:
            first_hidden = self.decoder.prefill(self._embed_prompt(prompt)[shared:], image.sequence)[-1]
        self._results.hidden[image.slot, 0] = first_hidden

    def _retire(self) -> None:
        """Give those whose last token is drawn their plans, and let them leave."""
        for image in [image for image in self._running if self._finished(image)]:
            plans = image.request.plans
            if plans[image.sample] is None:  # else it was interrupted on its way out
                plans[image.sample] = self._plan(image)
                self._windows.finish(image)
            self._leave(image)

    def _finished(self, image: _Image) -> bool:
        return image.num_generated == self.image_tokens.tokens_per_image

    def _leave(self, image: _Image) -> None:
        """The one way out of the batch: pages and output slot come back."""
        self._running.remove(image)
        self._batch = None
        self.cache.release(image.sequence)
        if image.slot >= 0:
            self._free_slots.append(image.slot)
            image.slot = -1

    def _lay_out(self) -> TokenBatch:
        by_vocabulary = sorted(self._running, key=lambda image: not image.params.image_tokens_only)
        for image, window in zip(by_vocabulary, self._windows.choose(by_vocabulary), strict=True):
            image.window = window
        return self._token_steps.lay_out([*by_vocabulary])

    def _embed_prompt(self, prompt: TokenPrompt) -> Tensor:
        embeddings = self.decoder.embed(uploaded(prompt.ids, torch.int64, self.decoder.device))
        if prompt.features is not None:
            span = prompt.feature_positions
            embeddings[span.start : span.stop] = prompt.features.to(embeddings)
        return embeddings

    def _plan(self, image: _Image) -> TokenPlan:
        drawn = self._results.tokens[image.slot, : self.image_tokens.tokens_per_image]
        first_id = self._token_steps.vocabularies[image.params.image_tokens_only].start
        error = None
        if bool((drawn < 0).any()):
            error = GenerationError(
                "the decoder's logits are not finite: "
                "the checkpoint's weights are damaged or overflow in this dtype"
            )
        return TokenPlan(drawn.clamp(min=0) + first_id, self._results.hidden[image.slot].clone(), error)


def _shared_positions(donor: TokenPrompt, prompt: TokenPrompt, prefill_chunk: int) -> int:
    """How many positions of a prompt have the bits that a donor's pages hold: all, or whole chunks.

    Less than a chunk is not worth sharing: what is left of it would read the weights all the same. At least
    the last position of a prompt that is not the donor's is read, for its hidden state.
    """
    same_features = donor.features is prompt.features and (
        prompt.features is None or donor.feature_positions == prompt.feature_positions
    )
    if same_features and donor.ids == prompt.ids:
        return len(prompt.ids)
    limit = len(prompt.ids) - 1
    if not same_features:
        limit = min(limit, *(p.feature_positions.start for p in (donor, prompt) if p.features is not None))
    shared = 0
    while (end := shared + prefill_chunk) <= limit and donor.ids[shared:end] == prompt.ids[shared:end]:
        shared = end
    return shared
