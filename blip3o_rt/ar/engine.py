"""The token engine: prompts in, image tokens and the hidden states that steer the diffusion stage out.

    first, second = (engine.submit(TokenPrompt(ids, SamplingParams(seed=seed))) for seed in (7, 8))
    while not (first.done and second.done):
        engine.step()  # at least one token of every image that runs, of these and of all others
    first.plan, second.plan

Images join and leave between passes. An image joins when there is a row for it and every page that it can
ever need is free. Its length is known, so nothing that runs is put back. Only images that run hold pages.
The one that has waited longest joins first, at the latest when all that run have left. An image's result
does not depend on the others, bit for bit, where the ops keep their contract that a row does not
(row_linear, decode_attention, sample_tokens). Nor does it depend on how many rows an image gets in a pass
(draft_window): guesses make it quicker, never different.
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
from blip3o_rt.errors import GenerationError, ParameterError
from blip3o_rt.graphs import GraphRunner
from blip3o_rt.params import MAX_DRAFT_WINDOW, SamplingParams


@dataclass(frozen=True)
class TokenPrompt:
    """The prompt of one image and how to sample it.

    `features` [n, hidden], where given, replace the embeddings at `feature_positions` of the prompt.
    `draft_window`: the most rows the image gets in a pass, 1 to 16, or None where the engine chooses.
    """

    ids: list[int]
    sampling: SamplingParams
    features: Tensor | None = None
    feature_positions: range = range(0)
    draft_window: int | None = 1


@dataclass(frozen=True)
class TokenPlan:
    """One image's tokens int64 [T] (vocabulary ids) and hidden states [T + 1, hidden], or its error.

    passes: of the image over the decoder, which drew a token or more each.
    """

    token_ids: Tensor
    hidden_states: Tensor
    passes: int = 0
    error: GenerationError | None = None


@dataclass(eq=False, kw_only=True)
class Request(Member):
    """What `submit` hands out: an image, whose `plan` is None until its last token is drawn.

    It holds an output slot and pages from joining to leaving.
    """

    prompt: TokenPrompt
    plan: TokenPlan | None = None
    passes: int = 0
    cancelled: bool = False

    @property
    def done(self) -> bool:
        """Whether nothing more will come of it: it has its plan, or it was cancelled."""
        return self.cancelled or self.plan is not None


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
        max_pages = -(-(max_prompt_tokens + image_tokens.tokens_per_image) // page_size)
        num_pages = max_batch * max_pages if num_pages is None else num_pages
        if num_pages < max_pages:
            raise ParameterError(
                f"num_pages is {num_pages}: accepted is at least {max_pages}, which one image takes"
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
            max_pages=max_pages,
        )
        self._windows = DraftWindows(max_rows, image_tokens.tokens_per_image)
        self._results = self._token_steps.results
        self._free_slots = list(range(max_batch))
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []  # in the order they joined
        self._batch: TokenBatch | None = None  # of those who run, until one joins or leaves

    def capture(self) -> None:
        """Capture the token step as graphs, where the device has them. Call it before the first request."""
        self._token_steps.capture()

    def submit(self, prompt: TokenPrompt) -> Request:
        """Put an image at the end of the queue.

        Its prompt has 1 to `max_prompt_tokens` ids of the vocabulary, and its top_k is not above that.
        """
        request = Request(
            prompt=prompt,
            params=prompt.sampling,
            prompt_length=len(prompt.ids),
            draft_window=prompt.draft_window,
        )
        self._waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """Take an image out of the queue or the batch; one that is finished stays finished.

        May be called between any two steps; for a request that is done it does nothing.
        """
        request.cancelled = request.cancelled or not request.done
        if request in self._waiting:
            self._waiting.remove(request)
        if request in self._running:
            self._leave(request)

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
        begun = time.perf_counter()
        with trace.span("ar.token", self._running[0].num_generated):
            tokens = batch.step()
        if not tokens.is_cuda:  # elsewhere the host does not see how long a pass takes
            self._windows.times.note(len(tokens), time.perf_counter() - begun)
        for image in self._running:
            image.passes += 1
        if any(self._finished(image) for image in self._running):
            self._retire()
        elif not self._windows.change(self._running):
            self._batch = batch
        return tokens

    def generate(
        self, prompts: list[TokenPrompt], callback: Callable[[int], None] | None = None
    ) -> list[TokenPlan]:
        """The plan of every prompt, in order.

        An image whose logits are not finite gets a plan with an error; the others are unaffected. The
        callback is told how many tokens are drawn; what it raises ends the call and returns all pages.
        """
        requests: list[Request] = []
        try:
            for prompt in prompts:
                requests.append(self.submit(prompt))
            while True:
                if callback is not None:
                    callback(sum(request.num_generated for request in requests))
                if all(request.done for request in requests):
                    return [request.plan for request in requests if request.plan is not None]
                self.step()
        finally:
            for request in requests:
                self.cancel(request)

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

    def _admit(self) -> None:
        """Let images join from the head of the queue while there is room for the next."""
        while self._waiting and self._free_slots:
            image = self._waiting[0]
            shared, donor = self._longest_prefix(image.prompt)
            pages = self.cache.pages_for(image.prompt_length + self.image_tokens.tokens_per_image)
            if pages - shared // self.cache.page_size > self.cache.free_pages:
                return
            self._waiting.popleft()
            self._running.append(image)
            try:
                self._join(image, donor, shared)
            except BaseException:
                self.cancel(image)
                raise

    def _longest_prefix(self, prompt: TokenPrompt) -> tuple[int, Request | None]:
        """How many of the prompt's positions some running image has in its pages, and the first with most."""
        chunk = self.decoder.prefill_chunk
        shared = [(_shared_positions(image.prompt, prompt, chunk), image) for image in self._running]
        return max(shared, key=itemgetter(0), default=(0, None))

    def _join(self, image: Request, donor: Request | None, shared: int) -> None:
        """Give an image its output slot and pages, and read what no other has read of its prompt."""
        self._batch = None
        self._windows.begin(image)
        image.slot = self._free_slots.pop()
        if donor is not None:
            image.sequence = self.cache.fork(donor.sequence, shared)
        self.cache.reserve(image.sequence, image.prompt_length + self.image_tokens.tokens_per_image)
        if donor is not None and shared == image.prompt_length:
            first_hidden = self._results.hidden[donor.slot, 0]
        else:
            unread = self._embed_prompt(image.prompt)[shared:]
            first_hidden = self.decoder.prefill(unread, image.sequence)[-1]
        self._results.hidden[image.slot, 0] = first_hidden

    def _retire(self) -> None:
        """Give those whose last token is drawn their plans, and let them leave."""
        for image in [image for image in self._running if self._finished(image)]:
            if image.plan is None:  # else it was interrupted on its way out
                image.plan = self._plan(image)
                self._windows.finish(image)
            self._leave(image)

    def _finished(self, image: Request) -> bool:
        return image.num_generated == self.image_tokens.tokens_per_image

    def _leave(self, image: Request) -> None:
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

    def _plan(self, image: Request) -> TokenPlan:
        drawn = self._results.tokens[image.slot, : self.image_tokens.tokens_per_image]
        first_id = self._token_steps.vocabularies[image.params.image_tokens_only].start
        error = None
        if bool((drawn < 0).any()):
            error = GenerationError(
                "the decoder's logits are not finite: "
                "the checkpoint's weights are damaged or overflow in this dtype"
            )
        hidden = self._results.hidden[image.slot].clone()
        return TokenPlan(drawn.clamp(min=0) + first_id, hidden, image.passes, error)


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
