"""Servers for tests: with fakes in place of the model where the model is not what is tested."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("fastapi")

from blip3o_rt.serve.client import Limits
from blip3o_rt.serve.messages import EngineOptions
from blip3o_rt.serve.server import Listener, ServerOptions, serve

FAKES = "tests.serve.fakes:load"


class RunningServer:
    """A server in a thread of this process, its engine in a process of its own."""

    def __init__(self, options: ServerOptions) -> None:
        self._listener: Listener | None = None
        self._listening = threading.Event()
        self._thread = threading.Thread(target=self._run, args=[options], daemon=True)
        self._thread.start()
        assert self._listening.wait(30)
        assert self._listener is not None
        self.listener = self._listener
        self.url = self.listener.url
        self.client = self.listener.server.client
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def _run(self, options: ServerOptions) -> None:
        asyncio.run(serve(options, self._started))

    def _started(self, listener: Listener) -> None:
        self._listener = listener
        self._listening.set()

    def wait_until(self, condition: Callable[[], bool], seconds: float = 60.0) -> None:
        """Wait for what happens in the server."""
        pause = threading.Event()
        for _ in range(int(seconds / 0.02)):
            if condition():
                return
            pause.wait(0.02)
        raise AssertionError(f"not within {seconds} s: {self.health()}")

    def wait_ready(self) -> RunningServer:
        self.wait_until(lambda: self.http.get("/ready").status_code == 200, 120)
        return self

    def health(self) -> dict[str, Any]:
        return self.http.get("/health").json()

    def metric(self, line: str) -> float:
        """The value of the line of /metrics that begins so; 0 where there is none."""
        lines = self.http.get("/metrics").text.splitlines()
        return sum(float(text.rpartition(" ")[2]) for text in lines if text.startswith(line))

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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long tests run where they are asked for: -m exhaustive, -m browser."""
    if config.option.markexpr:
        return
    for item in items:
        for marker in ("exhaustive", "browser"):
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=f"long: pytest -m {marker}"))
