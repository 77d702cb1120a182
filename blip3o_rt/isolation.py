"""What keeps a pipeline's requests apart from each other and from the program around them.

Requests of any thread take their turn, first come, first served. Within a turn torch's settings are the
pipeline's own, whatever the calling thread has set; callbacks run under the caller's.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, ParamSpec, TypeVar

import torch

from blip3o_rt.errors import ForkError
from blip3o_rt.machine import exact_arithmetic

P = ParamSpec("P")
R = TypeVar("R")

_SPAWN = (
    "which PyTorch's threads do not survive: load the model in the child process only, "
    "or start it with multiprocessing's 'spawn' method"
)


class FairLock:
    """A lock that threads get in the order in which they asked; a thread that has it may enter it again."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._threads: deque[int] = deque()  # the first one has the lock
        self._reentries = 0

    @property
    def taken(self) -> bool:
        """Whether any thread has the lock."""
        return bool(self._threads)

    def __enter__(self) -> None:
        thread = threading.get_ident()
        with self._changed:
            if self._threads and self._threads[0] == thread:
                self._reentries += 1
                return
            self._threads.append(thread)
            try:
                self._changed.wait_for(lambda: self._threads[0] == thread)
            except BaseException:  # Ctrl-C: what follows must not wait for this thread
                self._threads.remove(thread)
                self._changed.notify_all()
                raise

    def __exit__(self, *error: object) -> None:
        with self._changed:
            if self._reentries:
                self._reentries -= 1
            else:
                self._threads.popleft()  # of the thread that entered, whichever leaves
                self._changed.notify_all()


class Isolation:
    """The turns of one pipeline, which belongs to the process that loaded it, with its number of threads."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._threads = torch.get_num_threads()
        self._process = os.getpid()
        self._lock = FairLock()
        _note_threads(device, self._threads)

    @contextmanager
    def turn(self) -> Iterator[OwnSettings]:
        """A turn of the calling thread. Raises ForkError in a forked child that could only hang."""
        if os.getpid() != self._process:
            if self._threads > 1 or self._device.type == "cuda" or self._lock.taken:
                raise ForkError(f"this process was forked after the pipeline was loaded, {_SPAWN}")
            self._process = os.getpid()
        with self._lock, OwnSettings(self._device, self._threads) as settings:
            yield settings


class OwnSettings:
    """Torch's settings as a pipeline needs them, within a block; what was set before is put back after it.

    Tensors made within are ordinary ones, without gradients, on the device and of the dtype that the code
    names. The number of threads is the pipeline's, because the order of sums may depend on it.
    """

    def __init__(self, device: torch.device, threads: int) -> None:
        self._device, self._threads = device, threads

    def __enter__(self) -> OwnSettings:
        with ExitStack() as stack:
            for context in self._contexts():
                stack.enter_context(context)
            self._entered = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._entered.close()

    def outside(self, function: Callable[P, R]) -> Callable[P, R]:
        """A caller's function, which runs under the caller's settings."""

        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            self._entered.close()
            try:
                return function(*args, **kwargs)
            finally:
                self.__enter__()

        return run

    def _contexts(self) -> Iterator[AbstractContextManager[object]]:
        """Each is looked for where the one before has been entered."""
        yield torch.inference_mode(False)  # its tensors could not be written to outside
        yield torch.no_grad()
        for device_type in {"cpu", self._device.type}:
            if torch.is_autocast_enabled(device_type):
                yield torch.autocast(device_type, enabled=False)
        if torch.get_default_device().type != "cpu":
            yield torch.device("cpu")
        if self._device.type == "cuda":
            yield torch.cuda.device(self._device)
        if torch.get_num_threads() != self._threads:
            yield num_threads(self._threads)
        if sys.float_info.min / 2 == 0.0:
            yield kept(torch.set_flush_denormal, False, before=True)
        yield exact_arithmetic(self._device)


def num_threads(count: int) -> AbstractContextManager[None]:
    """Torch's threads within a block."""
    return kept(torch.set_num_threads, count, before=torch.get_num_threads())


@contextmanager
def kept(put: Callable[[Any], object], value: int, *, before: int) -> Iterator[None]:
    """A setting within the block, put back to what was before it."""
    put(value)
    try:
        yield
    finally:
        put(before)


_threads_of: int | None = None  # the process in which a pipeline first set threads or a GPU to work


def _note_threads(device: torch.device, threads: int) -> None:
    global _threads_of
    if threads > 1 or device.type == "cuda":
        _threads_of = _threads_of or os.getpid()


def check_fork() -> None:
    """Raise ForkError in a forked child of a process that had loaded a model: loading there would hang."""
    if _threads_of not in (None, os.getpid()) and torch.get_num_threads() > 1:
        raise ForkError(f"this process was forked from one that had loaded a model, {_SPAWN}")
