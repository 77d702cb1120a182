"""The engine process: loads a model, and works on what the front sends until the front is gone.

Started as `python -m blip3o_rt.serve.engine FD PARENT`, FD being its end of a socket pair. Two threads stand
beside the one that computes: one reads messages, and ends the process when the front's end closes; the other
sends heartbeats, which stop with the process, also when it is stopped rather than ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import queue
import signal
import sys
import threading
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path

from blip3o_rt.serve.messages import Cancel, Control, EngineOptions, Heartbeat, LoadFailed, Ready, Submit
from blip3o_rt.serve.scheduler import Scheduler

HEARTBEAT_SECONDS = 0.5
PR_SET_PDEATHSIG = 1
OOM_SCORE = (
    "500"  # half of the memory on top: where memory runs out the kernel ends the engine, not the front
)
IDLE_SECONDS = 0.5  # how long a wait for messages lasts at most


def main(fd: int, parent: int) -> None:
    """Run the engine. Does not return before the front is gone."""
    die_with(parent)
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)  # the front decides, and drains first
    engine = Engine(Connection(fd))
    try:
        engine.run()
    except (BrokenPipeError, ConnectionResetError):
        os._exit(0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)  # also where a thread of the model still runs


def die_with(parent: int) -> None:
    """Have the kernel end this process with its parent, and where memory runs out before its parent."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        with contextlib.suppress(OSError):  # where /proc is read-only
            Path("/proc/self/oom_score_adj").write_text(OOM_SCORE, encoding="ascii")
    if os.getppid() != parent:
        os._exit(0)


class Engine:
    """One engine process' end of the connection, and what happens between its threads."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._inbox: queue.SimpleQueue[Submit | Cancel | Control] = queue.SimpleQueue()
        self._scheduler: Scheduler | None = None

    def run(self) -> None:
        """Load the model, then work until the process is ended."""
        options: EngineOptions = self._connection.recv()
        for work in (self._beat, self._read):  # before it is ready: one that cannot hear must not say so
            threading.Thread(target=work, daemon=True).start()
        try:
            self._load(options)
        except Exception as error:
            line = " ".join(str(error).split()) or type(error).__name__
            self.send(LoadFailed(line))
            raise
        scheduler = self._scheduler
        assert scheduler is not None
        with self._settings():
            while True:
                self._receive(scheduler)
                if scheduler.busy:
                    scheduler.turn()

    def send(self, message: object) -> None:
        """Send a message; from any thread."""
        with self._sending:
            self._connection.send(message)

    def _load(self, options: EngineOptions) -> None:
        module, _, function = options.loader.partition(":")
        stages = getattr(importlib.import_module(module), function)(options.model, options.memory_reserve)
        if options.weights is not None:
            stages.control("update", options.weights)
        self._settings = stages.settings
        self._scheduler = Scheduler(stages, self.send)
        self.send(Ready(stages.info))

    def _receive(self, scheduler: Scheduler) -> None:
        """Take in what has come; where there is no work, wait for it."""
        try:
            while True:
                message = self._inbox.get(not scheduler.busy, IDLE_SECONDS)
                if isinstance(message, Submit):
                    scheduler.submit(message)
                elif isinstance(message, Control):
                    scheduler.control(message)
                else:
                    scheduler.cancel(message.id)
        except queue.Empty:
            return

    def _read(self) -> None:
        try:
            while True:
                self._inbox.put(self._connection.recv())
        except (EOFError, OSError):
            os._exit(0)
        except BaseException:  # an engine that hears nothing must not look alive
            try:
                sys.excepthook(*sys.exc_info())
            finally:
                os._exit(1)

    def _beat(self) -> None:
        page = os.sysconf("SC_PAGE_SIZE")
        sizes: Counter[int] = Counter()
        while True:
            scheduler = self._scheduler
            resident = int(open("/proc/self/statm").read().split()[1]) * page  # noqa: SIM115, PTH123
            turns, busy, waiting, running = 0, True, 0, 0
            if scheduler is not None:
                turns, busy = scheduler.turns, scheduler.busy
                waiting, running = scheduler.waiting, scheduler.running
            now = Counter(scheduler.batch_sizes) if scheduler is not None else Counter()
            try:
                self.send(Heartbeat(turns, busy, resident, dict(now - sizes), waiting, running))
            except OSError:
                os._exit(0)
            sizes = now
            time.sleep(HEARTBEAT_SECONDS)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
