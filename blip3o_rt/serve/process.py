"""One engine process as the front sees it: started, written to and read from without waiting for it."""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import psutil

from blip3o_rt.serve.messages import EngineOptions, Heartbeat

_STOP = object()

log = logging.getLogger("blip3o_rt.serve")


class EngineProcess:
    """A running engine process.

    Two threads carry messages, so that the event loop waits for neither the pipe nor the process.

    Args:
        options: What it loads.
        loop: The event loop that `on_message` and `on_exit` are called in.
        on_message: Takes every message that is not a heartbeat.
        on_exit: Called once, with a word on how the process ended.
    """

    def __init__(
        self,
        options: EngineOptions,
        loop: asyncio.AbstractEventLoop,
        on_message: Callable[[EngineProcess, object], None],
        on_exit: Callable[[EngineProcess, str], None],
    ) -> None:
        self._loop, self._on_message, self._on_exit = loop, on_message, on_exit
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "blip3o_rt.serve.engine", str(theirs.fileno()), str(os.getpid())]
            self._popen = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        self.connection = Connection(ours.detach())
        self.pid = self._popen.pid
        self._child = psutil.Process(self.pid)
        self.heartbeat: Heartbeat | None = None
        self.heard = time.monotonic()  # of it at all
        self.progressed = self.heard  # when it last did a piece of work, or had none to do
        self._outbox: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._outbox.put(options)
        self._writer = threading.Thread(target=self._write, daemon=True)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._writer.start()
        self._reader.start()

    def send(self, message: object) -> None:
        """Have a message sent; returns at once."""
        self._outbox.put(message)

    def kill(self) -> None:
        """End the process, whatever it does."""
        self._popen.kill()

    def join(self) -> None:
        """Wait until the process has ended, which it must have been told to."""
        self._popen.wait()

    @property
    def stopped(self) -> bool:
        """Whether the process has been stopped (SIGSTOP), and not ended."""
        try:
            return self._child.status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
        except psutil.Error:
            return False

    def _write(self) -> None:
        try:
            while (message := self._outbox.get()) is not _STOP:
                self.connection.send(message)
        except OSError:
            return  # the reader sees the end too
        except BaseException:
            self._popen.kill()  # rather than an engine that is never told
            raise

    def _read(self) -> None:
        try:
            while True:
                message = self.connection.recv()
                if isinstance(message, Heartbeat):
                    self._note(message)
                self._call(self._on_message, self, message)
        except (EOFError, OSError):
            pass
        except Exception:
            log.exception("a message of the engine process cannot be read")
        self._popen.kill()  # one that closed its end has nothing more to say
        code = self._popen.wait()
        self._outbox.put(_STOP)
        self._writer.join()
        self.connection.close()
        self._call(self._on_exit, self, _how_it_ended(code))

    def _note(self, heartbeat: Heartbeat) -> None:
        self.heard = time.monotonic()
        before = self.heartbeat
        if before is None or not heartbeat.busy or heartbeat.turns != before.turns:
            self.progressed = self.heard
        self.heartbeat = heartbeat

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            self._popen.kill()  # the loop is closed: nobody is left to hear


def _how_it_ended(code: int) -> str:
    if code == -9:
        return "was killed (by hand, or because memory ran out)"
    return f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
