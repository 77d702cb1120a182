"""Which image the engine works on next: token passes of all that run, and denoising steps of those ready.

A turn of the scheduler lets images join the token batch, draws at least one token of every image in it, and
makes one denoising step of those that share one. While images are denoised, only every fourth turn draws
tokens: what is nearest to its end is finished first. Messages are read between turns, so a request is
cancelled between two tokens and two steps.

An image joins in the order of priority, then of what its client has had so far (start-time fair queueing),
then of arrival. One minute of waiting raises the priority by one, so nothing waits for ever. Images are
denoised in the same order: as many share a step as the stages say, one where that is as fast. Where a step of
several costs little more than one alone, an image joins when its tokens are done and one has left, whatever
steps the others are at. Elsewhere those that are ready go together, and the next when they are finished;
after a lull the first image is drawn alone, from its tokens to its pixels, so that it need not wait for them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from blip3o_rt.errors import ParameterError
from blip3o_rt.serve.messages import (
    ABORT,
    KEEP,
    Accepted,
    Control,
    Controlled,
    Event,
    Failed,
    Finished,
    Partial,
    Progress,
    Started,
    Submit,
)

AGING_SECONDS = 60.0  # of waiting, for one level of priority
STEPS_PER_PASS = 4  # denoising steps for one pass over the token batch
PROGRESS_SECONDS = 0.1  # between two messages of progress of an image
USUAL_STEPS = 30  # of denoising, which cost as much as an image's tokens


@dataclass(eq=False)
class _Request:
    """A request that is not finished; `left` counts its images that are not."""

    submit: Submit
    arrived: float
    order: int
    left: int
    prepared: Any = None
    reference_seconds: float = 0.0


@dataclass(eq=False)
class _Image:
    """One image of a request on its way: waiting (no tokens), in the token batch, ready or being denoised."""

    request: _Request
    index: int
    seed: int
    tokens: Any = None
    drawing: Any = None
    started: float = 0.0
    passes: int = 0
    told: float = 0.0
    partials: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


class Scheduler:
    """Runs the requests of one engine process on the stages of its model.

    Args:
        stages: The model; blip3o_rt.serve.stages.Stages says what it does.
        send: Takes the events of requests.
        clock: Seconds.
    """

    def __init__(
        self,
        stages: Any,
        send: Callable[[Event | Controlled], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stages, self._send, self._clock = stages, send, clock
        self._requests: dict[str, _Request] = {}
        self._waiting: list[_Image] = []
        self._batch: list[_Image] = []  # draw tokens
        self._ready: list[_Image] = []  # have their tokens
        self._drawing: list[_Image] = []  # share denoising steps
        self._after_lull = True  # nothing was finished since there was nothing to do
        self._charged: dict[str, float] = {}  # by client: the work it has had
        self._virtual_time = 0.0  # what the client that was served last had had before
        self._order = 0
        self._paused = False
        self._pauses: list[Control] = []  # that are answered once nothing runs
        self.turns = 0
        self.batch_sizes: Counter[int] = Counter()

    @property
    def busy(self) -> bool:
        """Whether there is work to do now."""
        return bool(self.running if self._paused else self._requests)

    @property
    def waiting(self) -> int:
        """Images that have not joined the token batch."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Images between joining and their pixels."""
        return len(self._batch) + len(self._ready) + len(self._drawing)

    def submit(self, submit: Submit) -> None:
        """Check a request and put its images into the queue; answers Accepted or Failed."""
        try:
            prompt_tokens = self._stages.check(submit)
        except Exception as error:
            self._send(Failed(submit.id, *self._stages.failure(error)))
            return
        self._order += 1
        self._after_lull = self._after_lull or not self._requests
        request = _Request(submit, self._clock(), self._order, len(submit.seeds))
        self._requests[submit.id] = request
        self._waiting += [_Image(request, index, seed) for index, seed in submit.seeds]
        self._enter(submit.client)
        self._send(Accepted(submit.id, prompt_tokens))

    def cancel(self, id: str) -> None:
        """Drop a request and all of its images; one that is finished is left alone."""
        request = self._requests.pop(id, None)
        if request is None:
            return
        for image in self._batch:
            if image.request is request:
                self._stages.cancel_tokens(image.tokens)
        for images in (self._waiting, self._batch, self._ready):
            images[:] = [image for image in images if image.request is not request]
        for image in list(self._drawing):
            if image.request is request:
                self._end_drawing(image)

    def control(self, control: Control) -> None:
        """Pause, resume, or change the weights of an engine that is paused; answers Controlled."""
        if control.action == "pause":
            self._pause(control)
            return
        try:
            if control.action == "resume" and self._stages.asleep:
                raise ParameterError("the engine sleeps: wake it first")
            if control.action in ("update", "sleep", "wake") and (not self._paused or self.running):
                raise ParameterError("requests may run: pause the engine first")
            version, checksum = self._stages.control(control.action, control.value)
        except Exception as error:
            self._send(Controlled(control.id, failed=self._stages.failure(error)))
            return
        self._paused = self._paused and control.action != "resume"
        for request in self._requests.values():
            request.prepared = None  # references are encoded with the weights in use
        self._send(Controlled(control.id, version, checksum))

    def _pause(self, control: Control) -> None:
        self._paused = True
        if control.value == ABORT:
            for id in list(self._requests):
                self.cancel(id)
                self._send(Failed(id, "Unavailable", "the engine was paused: try again later"))
        elif control.value == KEEP:
            self._put_back()
        self._pauses.append(control)
        self._answer_pauses()

    def _put_back(self) -> None:
        """Have all images that run wait again, to be drawn from their beginning: their seeds decide them."""
        images = [*self._batch, *self._ready, *self._drawing]
        for image in self._batch:
            self._stages.cancel_tokens(image.tokens)
        for image in list(self._drawing):
            self._end_drawing(image)
        self._batch, self._ready = [], []
        for image in images:
            image.tokens, image.passes, image.partials = None, 0, 0
            image.seconds.clear()
        self._waiting = images + self._waiting

    def _answer_pauses(self) -> None:
        while self._pauses and not self.running:
            self._send(Controlled(self._pauses.pop().id, *self._stages.control("weights")))

    def turn(self) -> None:
        """Let images join, draw a token of every image in the batch, and make a denoising step."""
        self.turns += 1
        if not self._paused:
            self._join()
        if not (self._drawing or self._ready) or self.turns % STEPS_PER_PASS == 0:
            self._step_tokens()
        self._step_denoising()
        self._answer_pauses()

    def _enter(self, client: str) -> None:
        """A client that comes or comes back starts level with the one that was served last."""
        here = {request.submit.client for request in self._requests.values()}
        self._charged = {name: work for name, work in self._charged.items() if name in here}
        self._charged[client] = max(self._charged.get(client, 0.0), self._virtual_time)

    def _urgency(self, image: _Image) -> tuple[float, float, int, int]:
        """The smaller, the sooner."""
        request = image.request
        waited = (self._clock() - request.arrived) // AGING_SECONDS
        charged = self._charged.get(request.submit.client, 0.0)
        return (-request.submit.priority - waited, charged, request.order, image.index)

    def _join(self) -> None:
        """Fill the token batch, unless tokens are far ahead of denoising already."""
        most = self._stages.info.max_batch
        while self._waiting and len(self._batch) < most and self.running < 2 * most and not self._alone:
            image = min(self._waiting, key=self._urgency)
            self._waiting.remove(image)
            with self._guarded(image):
                self._begin_tokens(image)

    @property
    def _alone(self) -> bool:
        """Whether what runs is the first image after a lull, which others would hold up."""
        groups = self._stages.images_per_step > 1 and not self._stages.joins_underway
        return self._after_lull and groups and self.running > 0

    def _begin_tokens(self, image: _Image) -> None:
        request, submit = image.request, image.request.submit
        begin = self._clock()
        if request.prepared is None:
            request.prepared = self._stages.prepare(submit)
            if submit.references:
                request.reference_seconds = self._clock() - begin
        image.seconds["reference"] = request.reference_seconds
        image.started = self._clock()
        image.tokens = self._stages.begin_tokens(request.prepared, image.seed)
        self._batch.append(image)
        steps = int(submit.diffusion.get("steps", USUAL_STEPS))
        self._virtual_time = max(self._virtual_time, self._charged[submit.client])
        self._charged[submit.client] += 1 + steps / USUAL_STEPS
        self._send(Started(submit.id, image.index))

    def _step_tokens(self) -> None:
        if not self._batch:
            return
        self.batch_sizes[len(self._batch)] += 1
        try:
            self._stages.step_tokens()
        except Exception as error:
            self._fail_dropped(error)
        for image in list(self._batch):
            if image in self._batch:  # else an earlier one's failure took it along
                with self._guarded(image):
                    self._after_token(image)

    def _fail_dropped(self, error: Exception) -> None:
        """Fail the request whose prompt could not be read, which the token engine has dropped; or all."""
        dropped = [image for image in self._batch if getattr(image.tokens, "cancelled", False)]
        for image in dropped or list(self._batch):
            self._fail(image, error)

    def _after_token(self, image: _Image) -> None:
        image.passes += 1
        if self._stages.tokens_done(image.tokens):
            image.seconds["tokens"] = self._clock() - image.started
            self._batch.remove(image)
            self._ready.append(image)
        self._tell(
            image, "tokens", self._stages.tokens_drawn(image.tokens), self._stages.info.tokens_per_image
        )

    def _step_denoising(self) -> None:
        while self._ready and self._may_join():
            image = min(self._ready, key=self._urgency)
            self._ready.remove(image)
            self._drawing.append(image)
            with self._guarded(image):
                begin = self._clock()
                image.drawing = self._stages.begin_denoising(image.request.prepared, image.tokens)
                image.seconds["denoise"] = self._clock() - begin
        if self._drawing:
            self._denoise(list(self._drawing))

    def _may_join(self) -> bool:
        underway = any(image.drawing.done for image in self._drawing)
        room = len(self._drawing) < self._stages.images_per_step
        return room and (self._stages.joins_underway or not underway)

    def _denoise(self, images: list[_Image]) -> None:
        """Make the next step of images together; one by one where that fails, so that one fails alone."""
        begin, before = self._clock(), [image.drawing.done for image in images]
        failure: Exception | None = None
        try:
            self._stages.step_denoising([image.drawing for image in images])
        except Exception as error:
            failure = error
        seconds = self._clock() - begin
        for image, done in zip(images, before, strict=True):
            if image not in self._drawing:  # an earlier one's failure took it along
                continue
            if failure is None or image.drawing.done > done:
                with self._guarded(image):
                    self._after_step(image, seconds)
            elif len(images) == 1:
                self._fail(image, failure)
            else:
                self._denoise([image])

    def _after_step(self, image: _Image, seconds: float) -> None:
        """Send what the step made of an image; after its last step, decode it."""
        begin, submit, drawing = self._clock(), image.request.submit, image.drawing
        if drawing.done in _preview_steps(drawing.total, submit.partial_images):
            self._send(Partial(submit.id, image.index, image.partials, drawing.preview()))
            image.partials += 1
        image.seconds["denoise"] += seconds + self._clock() - begin
        self._tell(image, "denoise", drawing.done, drawing.total)
        if drawing.done == drawing.total:
            self._finish(image)

    def _finish(self, image: _Image) -> None:
        begin = self._clock()
        pixels = image.drawing.decode()
        image.seconds["decode"] = self._clock() - begin
        self._end_drawing(image)
        request = image.request
        tokens_per_pass = self._stages.info.tokens_per_image / max(1, image.passes)
        request.left -= 1
        self._after_lull = False
        if request.left == 0:
            self._requests.pop(request.submit.id, None)
        self._send(Finished(request.submit.id, image.index, pixels, image.seconds, tokens_per_pass))

    def _end_drawing(self, image: _Image) -> None:
        """An image shares no further step, and another may begin."""
        self._drawing.remove(image)
        if image.drawing is not None:
            image.drawing.close()
            image.drawing = None

    def _tell(self, image: _Image, stage: str, done: int, total: int) -> None:
        now = self._clock()
        if image.request.submit.progress and (now - image.told >= PROGRESS_SECONDS or done == total):
            image.told = now
            self._send(Progress(image.request.submit.id, image.index, stage, done, total))

    @contextmanager
    def _guarded(self, image: _Image) -> Iterator[None]:
        """A block whose failure ends the image's request and no other."""
        try:
            yield
        except Exception as error:
            self._fail(image, error)

    def _fail(self, image: _Image, error: Exception) -> None:
        submit = image.request.submit
        if submit.id in self._requests:
            self.cancel(submit.id)
            self._send(Failed(submit.id, *self._stages.failure(error)))


def _preview_steps(total: int, previews: int) -> set[int]:
    """The steps after which an estimate is sent: evenly spread, none after the last."""
    return {total * number // (previews + 1) for number in range(1, previews + 1)} - {0, total}
