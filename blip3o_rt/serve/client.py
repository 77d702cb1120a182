"""An engine process that is kept running, and the requests made of it; all of it in one asyncio loop.

Every request ends in exactly one of STATES. A request that was in an engine process when that process ended
is given to the next one: images that are done are kept, and its seeds make the others the same. Requests that
had started go alone first, one after the other, so that one that ends the process takes no other along.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from blip3o_rt.errors import Blip3oError
from blip3o_rt.serve.messages import (
    Accepted,
    Cancel,
    Control,
    Controlled,
    EngineOptions,
    Event,
    Failed,
    Finished,
    Heartbeat,
    LoadFailed,
    ModelInfo,
    Progress,
    Ready,
    Started,
    Submit,
)
from blip3o_rt.serve.process import EngineProcess

COMPLETED, FAILED, CANCELLED, EXPIRED = STATES = ("completed", "failed", "cancelled", "expired")
MAX_ATTEMPTS = 3  # engine processes that a request may see end while it runs in them
QUIET_SECONDS = 5.0  # without a heartbeat: stalled
PATIENCE_SECONDS = 20.0  # without a heartbeat: ended and started anew
RESTART_SECONDS = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)  # before the next start, by failures in a row
GIVE_UP_LOADS = 3  # loads that fail in a row, before waiting requests are failed
LOST = "EngineLost"

log = logging.getLogger("blip3o_rt.serve")


class RequestError(Blip3oError):
    """A request ended without its images. `kind` names the error's class, `state` is one of STATES."""

    def __init__(self, message: str, kind: str, state: str = FAILED, param: str | None = None) -> None:
        super().__init__(message)
        self.kind, self.state, self.param = kind, state, param


class Refused(RequestError):
    """A request was not taken at all: the queue is full, or there is no engine. Try after `retry_after` s."""

    def __init__(self, message: str, kind: str, retry_after: float) -> None:
        super().__init__(message, kind)
        self.retry_after = retry_after


@dataclass(frozen=True)
class Limits:
    """What is admitted.

    Args:
        queue: Images in all, running ones included.
        client_queue: Images of one client.
        reference_bytes: Samples of reference images held for requests that are not finished.
        seconds: How long a request may take, from coming to its last image.
        stall_seconds: How long the engine may take for one piece of work, a step for instance, before it is
            ended and started anew.
    """

    queue: int = 64
    client_queue: int = 64
    reference_bytes: int = 1 << 30
    seconds: float = 600.0
    stall_seconds: float = 300.0


@dataclass(eq=False)
class Handle:
    """A request that was taken: its events, and its end."""

    submit: Submit
    came: float = field(default_factory=time.monotonic)
    accepted: Accepted | None = None
    started: float | None = None
    ended: float | None = None
    state: str | None = None
    error: RequestError | None = None
    images: dict[int, Finished] = field(default_factory=dict)
    attempts: int = 0
    durable: bool = False  # of a job, which outlives engine and server
    in_engine: bool = False
    events: asyncio.Queue[Event | None] = field(default_factory=asyncio.Queue)
    timer: asyncio.TimerHandle | None = None

    def __aiter__(self) -> AsyncIterator[Event]:
        return self._iterate()

    async def _iterate(self) -> AsyncIterator[Event]:
        """Events until the request ends. Raises RequestError where that is not with all images."""
        while (event := await self.events.get()) is not None:
            yield event
        if self.error is not None:
            raise self.error

    @property
    def missing(self) -> tuple[tuple[int, int], ...]:
        """Index and seed of every image that is not done."""
        return tuple(pair for pair in self.submit.seeds if pair[0] not in self.images)


class EngineClient:
    """Keeps an engine process running and takes requests for it.

    Args:
        options: What the engine loads.
        limits: What is admitted.
        on_end: Told of every request that ended.
        on_image: Told of every image that is done.
        on_heartbeat: Told of every heartbeat.
    """

    def __init__(
        self,
        options: EngineOptions,
        limits: Limits | None = None,
        on_end: Callable[[Handle], None] = lambda handle: None,
        on_image: Callable[[Finished], None] = lambda image: None,
        on_heartbeat: Callable[[Heartbeat], None] = lambda heartbeat: None,
    ) -> None:
        self.options, self.limits = options, limits or Limits()
        self.info: ModelInfo | None = None
        self.restarts = 0
        self.load_error: str | None = None
        self.draining = False
        self._on_end, self._on_image, self._on_heartbeat = on_end, on_image, on_heartbeat
        self._process: EngineProcess | None = None
        self._ready = asyncio.Event()
        self._first_ready_or_failed = asyncio.Event()
        self._handles: dict[str, Handle] = {}
        self._controls: dict[str, asyncio.Future[Controlled]] = {}
        self._suspects: deque[Handle] = deque()  # started in a process that ended; wait to be tried alone
        self._failures = 0  # processes that ended without an image between, in a row
        self._failed_loads = 0
        self._closed = False
        self._tasks: list[asyncio.Task[None]] = []
        self._seconds_per_image = 5.0  # a moving mean, for Retry-After

    # Starting and stopping

    def start(self) -> None:
        """Start the engine process; it loads while this returns."""
        self._loop = asyncio.get_running_loop()
        self._start_process()
        self._tasks = [self._loop.create_task(self._watch())]

    async def wait_ready(self) -> ModelInfo:
        """Wait until the model is loaded. Raises RequestError where loading fails."""
        await self._first_ready_or_failed.wait()
        if self.info is None or not self._ready.is_set():
            raise RequestError(self.load_error or "the engine did not start", LOST)
        return self.info

    async def close(self) -> None:
        """End the engine process; requests that are left are cancelled."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        for handle in list(self._handles.values()):
            self._end(handle, CANCELLED, RequestError("the server stopped", "Cancelled", CANCELLED))
        if self._process is not None:
            process, self._process = self._process, None
            process.kill()
            await asyncio.get_running_loop().run_in_executor(None, process.join)

    async def drain(self, seconds: float) -> None:
        """Take no more requests, and wait for so many seconds until those that are not durable have ended."""
        self.draining = True
        end = time.monotonic() + seconds
        while any(not handle.durable for handle in self._handles.values()) and time.monotonic() < end:
            await asyncio.sleep(0.05)

    # What is known of the engine

    @property
    def ready(self) -> bool:
        """Whether requests are worked on: loaded, running, and not about to stop."""
        return self._ready.is_set() and not self.draining and self.status == "ok"

    @property
    def status(self) -> str:
        """ "ok", "loading", "restarting", "stopped" (SIGSTOP), "stalled" or "failing"."""
        process = self._process
        if process is None:
            return "failing" if self._failed_loads or self._failures > 1 else "restarting"
        if process.stopped:
            return "stopped"
        if self._silent(process, QUIET_SECONDS) or self._hangs(process):
            return "stalled"
        if self._ready.is_set():
            return "ok"
        if self._failed_loads or self._failures > 1:
            return "failing"
        return "loading" if self.restarts == 0 else "restarting"

    @property
    def process(self) -> EngineProcess | None:
        """The engine process there is."""
        return self._process

    @property
    def waiting(self) -> int:
        """Images that were taken and have not started."""
        return sum(len(handle.missing) for handle in self._handles.values() if handle.started is None)

    @property
    def running(self) -> int:
        """Images of requests that have started, not done yet."""
        return self._images() - self.waiting

    def position(self, handle: Handle) -> int:
        """How many images are in front of a request that has not started; 0 where it has."""
        if handle.started is not None or handle.state is not None:
            return 0
        return sum(
            len(other.missing)
            for other in self._handles.values()
            if other.started is None
            and (-other.submit.priority, other.came) < (-handle.submit.priority, handle.came)
        )

    def retry_after(self) -> float:
        """Seconds after which a place in the queue may be free."""
        return min(120.0, max(1.0, self._seconds_per_image * self._images() / 4))

    # Requests

    def submit(
        self,
        submit: Submit,
        *,
        seconds: float | None = None,
        durable: bool = False,
        admitted: bool = False,
    ) -> Handle:
        """Take a request. Its id may be empty.

        Args:
            submit: The request.
            seconds: How long it may take; at most what the limits say, unless it is durable.
            durable: It waits for an engine, however long.
            admitted: Take it whatever the queue: it was admitted before.

        Raises:
            Refused: The queue is full, the engine is not there, or the server is about to stop.
        """
        if not admitted:
            self.admit(submit, durable)
        submit = dataclasses.replace(submit, id=submit.id or uuid.uuid4().hex)
        allowed = seconds or self.limits.seconds
        if not durable:
            allowed = min(allowed, self.limits.seconds)
        handle = Handle(submit, durable=durable)
        self._handles[submit.id] = handle
        handle.timer = asyncio.get_running_loop().call_later(allowed, self._expire, handle, allowed)
        if self._ready.is_set():
            self._give(handle)
        return handle

    def cancel(self, handle: Handle, why: str = "the request was cancelled") -> None:
        """End a request that has not ended; its client is gone or wants no more of it."""
        self._end(handle, CANCELLED, RequestError(why, "Cancelled", CANCELLED))

    async def control(self, action: str, value: str = "") -> Controlled:
        """Ask something of the engine itself: see Control.

        Raises:
            Refused: The engine is not there.
            RequestError: It could not be done; everything is as before.
        """
        if self._process is None or not self._ready.is_set():
            raise Refused(self._why_unavailable(), "Unavailable", 5.0)
        control = Control(uuid.uuid4().hex, action, value)
        future = self._controls[control.id] = self._loop.create_future()
        self._process.send(control)
        answer = await future
        if answer.failed is not None:
            raise RequestError(answer.failed[1], answer.failed[0])
        if action == "update":
            self.options = dataclasses.replace(self.options, weights=value)  # of the next process too
        return answer

    def admit(self, submit: Submit, durable: bool = False) -> None:
        """Raise Refused where a request is not to be taken now."""
        if self.draining or self._closed:
            raise Refused("the server is about to stop: ask another one", "Unavailable", 5.0)
        if not durable and (not self._ready.is_set() or self.status != "ok"):
            raise Refused(self._why_unavailable(), "Unavailable", 5.0)
        count, limits = len(submit.seeds), self.limits
        if self._images() + count > limits.queue:
            message = f"{self._images()} images wait or run, and {limits.queue} are accepted: try again later"
            raise Refused(message, "QueueFull", self.retry_after())
        own = sum(
            len(handle.missing) for handle in self._handles.values() if handle.submit.client == submit.client
        )
        if own + count > limits.client_queue:
            message = (
                f"{own} of your images wait or run, and {limits.client_queue} are accepted: wait for them"
            )
            raise Refused(message, "ClientQueueFull", self.retry_after())
        held = sum(_reference_bytes(handle.submit) for handle in self._handles.values())
        if held + _reference_bytes(submit) > limits.reference_bytes:
            raise Refused("the reference images of requests fill the memory for them", "QueueFull", 5.0)

    def _why_unavailable(self) -> str:
        reasons = {
            "loading": "the model is being loaded: try again later",
            "restarting": "the engine is being restarted: try again later",
            "stopped": "the engine process was stopped: try again later",
            "stalled": "the engine does not answer: try again later",
            "failing": f"the engine cannot be started ({self.load_error}): try again later",
        }
        return reasons.get(self.status, reasons["restarting"])

    def _images(self) -> int:
        return sum(len(handle.missing) for handle in self._handles.values())

    def _give(self, handle: Handle) -> None:
        """Hand a request to the engine process, as far as its images are not done."""
        assert self._process is not None
        handle.in_engine = True
        self._process.send(dataclasses.replace(handle.submit, seeds=handle.missing))

    def _expire(self, handle: Handle, seconds: float) -> None:
        message = f"the request was not finished within {seconds:g} seconds"
        self._end(handle, EXPIRED, RequestError(message, "DeadlineExceeded", EXPIRED))

    def _end(self, handle: Handle, state: str, error: RequestError | None = None) -> None:
        """The one way a request ends."""
        if self._handles.pop(handle.submit.id, None) is not handle:
            return
        handle.state, handle.error, handle.ended = state, error, time.monotonic()
        if handle.timer is not None:
            handle.timer.cancel()
        if handle.in_engine and state != COMPLETED and self._process is not None:
            self._process.send(Cancel(handle.submit.id))
        handle.in_engine = False
        handle.events.put_nowait(None)
        self._on_end(handle)
        self._try_next_suspect()

    # The engine process

    def _start_process(self) -> None:
        self._process = EngineProcess(self.options, self._loop, self._message, self._exit)

    def _message(self, process: EngineProcess, message: object) -> None:
        if process is not self._process:
            return
        if isinstance(message, Heartbeat):
            self._on_heartbeat(message)
        elif isinstance(message, Ready):
            process.progressed = time.monotonic()
            self._became_ready(message.info)
        elif isinstance(message, LoadFailed):
            self.load_error = message.message
        elif isinstance(message, Controlled):
            future = self._controls.pop(message.id)
            if not future.done():
                future.set_result(message)
        else:
            self._event(message)  # type: ignore[arg-type]

    def _became_ready(self, info: ModelInfo) -> None:
        log.info("engine ready", extra={"fields": {"model": info.name, "device": info.device}})
        self.info, self.load_error, self._failed_loads = info, None, 0
        self._ready.set()
        self._first_ready_or_failed.set()
        for handle in self._handles.values():
            if handle not in self._suspects:
                self._give(handle)
        self._try_next_suspect()

    def _try_next_suspect(self) -> None:
        """Give the next of those that may have ended a process to the engine, when no other of them is."""
        while self._suspects and self._suspects[0].state is not None:
            self._suspects.popleft()
        if self._suspects and not self._suspects[0].in_engine and self._ready.is_set():
            self._give(self._suspects[0])

    def _event(self, event: Event) -> None:
        handle = self._handles.get(event.id)
        if handle is None or not handle.in_engine:
            return  # it ended here first
        if isinstance(event, Failed):
            self._end(handle, FAILED, RequestError(event.message, event.kind, param=event.param))
            return
        if isinstance(event, Accepted):
            handle.accepted = event
        elif isinstance(event, Started):
            handle.started = handle.started or time.monotonic()
        elif isinstance(event, Finished):
            self._failures = 0
            self._on_image(event)
            handle.images[event.index] = event
            spent = sum(event.seconds.values())
            self._seconds_per_image += 0.1 * (spent - self._seconds_per_image)
        if not isinstance(event, Progress) or handle.events.qsize() < 64:  # a reader that is slow misses some
            handle.events.put_nowait(event)
        if isinstance(event, Finished) and not handle.missing:
            self._end(handle, COMPLETED)

    def _exit(self, process: EngineProcess, how: str) -> None:
        if process is not self._process or self._closed:
            return
        log.error("engine process %s", how, extra={"fields": {"pid": process.pid}})
        for id in list(self._controls):
            self._controls.pop(id).set_result(Controlled(id, failed=(LOST, f"the engine process {how}")))
        loaded = self._ready.is_set()
        self._process = None
        self._ready.clear()
        self.restarts += 1
        self._failures += 1
        if not loaded:
            self._failed_loads += 1
            self.load_error = self.load_error or f"its process {how} while it loaded"
            self._first_ready_or_failed.set()
        self._take_back(how)
        pause = RESTART_SECONDS[min(self._failures, len(RESTART_SECONDS)) - 1]
        self._tasks.append(self._loop.create_task(self._restart(pause)))

    def _take_back(self, how: str) -> None:
        """Requests of a process that ended wait for the next one; those that it tried too often fail."""
        for handle in list(self._handles.values()):
            if handle.in_engine and (handle.started is not None or handle.accepted is None):
                handle.attempts += 1  # it was being drawn, or being taken in
            handle.in_engine, handle.started = False, None
            if handle.attempts >= MAX_ATTEMPTS or (
                self._failed_loads >= GIVE_UP_LOADS and not handle.durable
            ):
                message = f"the engine process {how} while the request ran or waited"
                self._end(handle, FAILED, RequestError(message, LOST))
        self._suspects = deque(handle for handle in self._handles.values() if handle.attempts)

    async def _restart(self, pause: float) -> None:
        await asyncio.sleep(pause)
        if not self._closed and self._process is None:
            self._start_process()
        self._tasks = [task for task in self._tasks if not task.done()]

    def _silent(self, process: EngineProcess, seconds: float) -> bool:
        """Whether nothing was heard for so long; while it loads, libraries may hold the interpreter."""
        most = seconds if self._ready.is_set() else max(seconds, self.limits.stall_seconds)
        return time.monotonic() - process.heard > most

    def _hangs(self, process: EngineProcess) -> bool:
        """Whether the process is at one piece of work for too long; loading may take any time."""
        return self._ready.is_set() and time.monotonic() - process.progressed > self.limits.stall_seconds

    async def _watch(self) -> None:
        """End an engine process that has long been silent, or at one piece of work."""
        while True:
            await asyncio.sleep(1.0)
            process = self._process
            if process is None:
                continue
            if self._silent(process, PATIENCE_SECONDS) or self._hangs(process):
                now = time.monotonic()
                log.error(
                    "engine process silent for %.0f s, without progress for %.0f s: ending it",
                    now - process.heard,
                    now - process.progressed,
                )
                process.kill()


def _reference_bytes(submit: Submit) -> int:
    return sum(len(image.samples) for image in submit.references)
