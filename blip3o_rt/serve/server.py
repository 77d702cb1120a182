"""A server: engine, jobs and HTTP together, from starting to draining."""

from __future__ import annotations

import asyncio
import signal
import socket
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from blip3o_rt.serve.admin import admin_routes
from blip3o_rt.serve.app import make_app
from blip3o_rt.serve.client import EngineClient, Limits
from blip3o_rt.serve.images import ImageWorkers
from blip3o_rt.serve.jobs import Jobs
from blip3o_rt.serve.keys import Keys
from blip3o_rt.serve.messages import EngineOptions
from blip3o_rt.serve.metrics import Metrics
from blip3o_rt.serve.middleware import Authentication, BodyLimits, ConcurrencyLimit, RequestContext
from blip3o_rt.serve.service import Service
from blip3o_rt.serve.store import Store

HEADER_SECONDS = 15.0  # for a client to send a request's headers
KEEP_ALIVE_SECONDS = 15


@dataclass(frozen=True)
class ServerOptions:
    """How a server is run.

    Args:
        engine: What the engine process loads.
        host: The address to listen on.
        port: The port; 0 takes a free one.
        data: The folder of jobs and linked images; None is a temporary one.
        keys: A file of bearer keys; None accepts everybody.
        admin_keys: A file of keys that may pause the engine and replace its weights; None: nobody may.
        limits: What is admitted.
        max_images: Images of a request.
        max_steps: Denoising steps of an image.
        max_body: Bytes of a body.
        max_pixels: Pixels of an uploaded image.
        max_requests: Requests that are answered at once.
        keep_seconds: How long jobs and linked images are kept.
        keep_bytes: How much of them is kept.
        drain_seconds: How long requests may go on after SIGTERM.
        log_prompts: Whether the log names prompts.
    """

    engine: EngineOptions = field(default_factory=EngineOptions)
    host: str = "127.0.0.1"
    port: int = 8000
    data: Path | None = None
    keys: Path | None = None
    admin_keys: Path | None = None
    limits: Limits = field(default_factory=Limits)
    max_images: int = 10
    max_steps: int = 100
    max_body: int = 64 * 2**20
    max_pixels: int = 32 * 2**20
    max_requests: int = 2000
    keep_seconds: float = 7 * 86_400.0
    keep_bytes: int = 10 * 2**30
    drain_seconds: float = 30.0
    log_prompts: bool = False


class Server:
    """Everything of one server but its socket; `app` is the ASGI application, `running` its life."""

    def __init__(
        self, options: ServerOptions, make_client: Callable[..., EngineClient] = EngineClient
    ) -> None:
        self.options = options
        keys = Keys(options.keys) if options.keys is not None else None
        self._temporary = tempfile.TemporaryDirectory(prefix="blip3o-rt-") if options.data is None else None
        folder = options.data or Path(self._temporary.name)  # type: ignore[union-attr]
        self._store = Store(folder, options.keep_seconds, options.keep_bytes)
        self._workers = ImageWorkers(options.max_pixels)
        metrics = Metrics()
        self.client = make_client(
            options.engine, options.limits, metrics.ended, metrics.finished, metrics.heartbeat
        )
        self._jobs = Jobs(self._store, self.client, self._workers)
        self._service = Service(
            self.client,
            self._workers,
            self._store,
            metrics,
            options.max_images,
            options.max_steps,
            options.log_prompts,
        )
        routes = make_app(self._service, self._jobs, keys is not None)
        if options.admin_keys is not None:
            routes.include_router(admin_routes(self.client, Keys(options.admin_keys)))
        app: ASGIApp = routes
        app = BodyLimits(app, options.max_body)
        app = Authentication(app, keys)
        app = ConcurrencyLimit(app, options.max_requests)
        self.app = RequestContext(app)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Start the engine and go on with jobs; at the end leave them to the next server."""
        loop = asyncio.get_running_loop()
        self.client.start()
        await self._jobs.start()
        tasks = [
            loop.create_task(self._jobs.expire()),
            loop.create_task(self._service.metrics.watch_loop()),
        ]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await self._jobs.close()
            await self.client.close()
            self._workers.close()
            await loop.run_in_executor(None, self._store.close)
            if self._temporary is not None:
                self._temporary.cleanup()


class TimedProtocol(H11Protocol):
    """HTTP/1.1 that closes connections whose request headers do not come in time."""

    _header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for headers."""
        super().connection_made(transport)
        self._wait_for_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop to wait."""
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take in a part of a request; one whose headers are complete has a cycle that is not over."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()
        elif self._header_timer is None:
            self._wait_for_headers()

    def _wait_for_headers(self) -> None:
        self._header_timer = self.loop.call_later(HEADER_SECONDS, self._give_up)

    def _stop_waiting(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _give_up(self) -> None:
        self._header_timer = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


class Listener(uvicorn.Server):
    """uvicorn on a socket that is bound at once; it lets requests end before it closes connections."""

    def __init__(self, server: Server) -> None:
        options = server.options
        super().__init__(
            uvicorn.Config(
                server.app,
                host=options.host,
                port=options.port,
                http=TimedProtocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=5,
                server_header=False,
            )
        )
        self.server = server
        self.socket = self.config.bind_socket()
        self.socket.listen(self.config.backlog)  # who comes before the engine is begun waits, and is answered
        host, port = self.socket.getsockname()[:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT end the server; unlike uvicorn's own, they are not raised again afterwards."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handlers = {name: signal.signal(name, self.handle_exit) for name in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for name, handler in handlers.items():
                signal.signal(name, handler)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse what is new, wait for what runs, then close."""
        await self.server.client.drain(self.server.options.drain_seconds)
        await super().shutdown(sockets)


async def serve(options: ServerOptions, started: Callable[[Listener], None]) -> None:
    """Run a server until SIGTERM or SIGINT.

    Args:
        options: How it is run.
        started: Called once it listens; `should_exit` of what it is given ends the server.
    """
    server = Server(options)
    listener = Listener(server)
    started(listener)
    async with server.running():
        await listener.serve([listener.socket])
