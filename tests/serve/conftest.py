"""Servers for tests: with fakes in place of the model where the model is not what is tested."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typing_extensions import Self

pytest.importorskip("fastapi")

from blip3o_rt.serve.client import EngineClient, Limits
from blip3o_rt.serve.messages import EngineOptions
from blip3o_rt.serve.server import Listener, ServerOptions, serve

FAKES = "tests.serve.fakes:load"


class HttpServer:
    """What tests ask of a server that runs somewhere."""

    url: str
    http: httpx.Client

    def wait_until(self, condition: Callable[[], bool], seconds: float = 60.0) -> None:
        """Wait for what happens in the server."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"not within {seconds} s: {self.health()}"
            time.sleep(0.02)

    def wait_ready(self) -> Self:
        self.wait_until(lambda: self.http.get("/ready").status_code == 200, 120)
        return self

    def health(self) -> dict[str, Any]:
        return self.http.get("/health").json()

    def metric(self, line: str) -> float:
        """The sum of the lines of /metrics that begin so."""
        lines = self.http.get("/metrics").text.splitlines()
        return sum(float(text.rpartition(" ")[2]) for text in lines if text.startswith(line))


class ServerProcess(HttpServer):
    """`blip3o-rt serve` as it is run, with the embedded model; more arguments may be given."""

    def __init__(self, *arguments: str) -> None:
        command = [
            sys.executable,
            "-m",
            "blip3o_rt",
            "serve",
            "--port",
            "0",
            "--log-level",
            "warning",
            *arguments,
        ]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().split()[1].rstrip("/")
        self.http = httpx.Client(base_url=self.url, timeout=600)

    def stop(self) -> int:
        """End it as a service manager does; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        self.process.kill()
        self.wait()

    def wait(self) -> int:
        code = self.process.wait(60)
        self.http.close()
        return code


class RunningServer(HttpServer):
    """A server in a thread of this process, its engine in a process of its own."""

    def __init__(self, options: ServerOptions) -> None:
        self._listener: Listener | None = None  # from its thread
        self._listening = threading.Event()
        self._thread = threading.Thread(target=self._run, args=[options], daemon=True)
        self._thread.start()
        assert self._listening.wait(30)
        assert self._listener is not None
        self.listener: Listener = self._listener
        self.url = self.listener.url
        self.client: EngineClient = self.listener.server.client
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def _run(self, options: ServerOptions) -> None:
        asyncio.run(serve(options, self._started))

    def _started(self, listener: Listener) -> None:
        self._listener = listener
        self._listening.set()

    def stop(self) -> None:
        self.listener.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()
        self.http.close()


@pytest.fixture
def start() -> Iterator[Callable[..., RunningServer]]:
    """Starts servers with fakes; options are those of ServerOptions, `model` what the fakes take."""
    servers: list[RunningServer] = []

    def begin(model: dict[str, Any] | None = None, **options: Any) -> RunningServer:
        engine = EngineOptions(model or {}, loader=FAKES)
        servers.append(RunningServer(ServerOptions(engine, port=0, drain_seconds=5.0, **options)))
        return servers[-1]

    yield begin
    for server in servers:
        server.stop()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One server with fakes for the tests of a file."""
    folder: Path = tmp_path_factory.mktemp("data")
    engine = EngineOptions({}, loader=FAKES)
    limits = Limits(queue=200, client_queue=200)
    running = RunningServer(
        ServerOptions(engine, port=0, data=folder, limits=limits, max_pixels=100_000)
    ).wait_ready()
    yield running
    running.stop()
