"""What stands before every route: a request id and a log line, keys, and limits on bodies; plain ASGI."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
import uuid
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from blip3o_rt.serve.api_error import ApiError
from blip3o_rt.serve.keys import Keys

# /admin asks for keys of its own; the name of a result is as hard to guess as a key.
OPEN_PATHS = re.compile(r"/|/(health|ready|docs|openapi\.json|favicon\.ico)|/(page|admin|v1/results)/.*")
PROBES = ("/health", "/ready", "/metrics")
CHUNK_SECONDS = 20.0  # between two pieces of a body
BODY_SECONDS = 120.0  # for a whole body
SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (
        b"content-security-policy",
        b"default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; "
        b"frame-ancestors 'none'",
    ),
)

log = logging.getLogger("blip3o_rt.serve.access")


class RequestContext:
    """Gives every request an id, headers of caution, and a line in the log when it ends."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = _header(scope, b"x-request-id") or ""
        request_id = given if re.fullmatch(r"[\w.-]{1,64}", given) else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        begin, status, method = time.monotonic(), 499, scope["method"]
        if method == "HEAD":  # the protocol leaves the body of the answer out
            scope = {**scope, "method": "GET"}

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                extra = [(b"x-request-id", request_id.encode()), *SECURITY_HEADERS]
                message = {**message, "headers": [*message.get("headers", []), *extra]}
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except ClientDisconnect:
            status = 499
        finally:
            fields = {
                "request_id": request_id,
                "client": state.get("client", ""),
                "method": method,
                "path": scope["path"],
                "status": state.get("status", status),
                "seconds": round(time.monotonic() - begin, 3),
                **state.get("log", {}),
            }
            quiet = scope["path"] in PROBES
            log.log(logging.DEBUG if quiet else logging.INFO, "request", extra={"fields": fields})


class ConcurrencyLimit:
    """Refuses requests while so many are being answered; the probes of a service manager never."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most, self._running = app, most, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in PROBES:
            await self._app(scope, receive, send)
            return
        if self._running >= self._most:
            error = ApiError(
                503,
                f"{self._most} requests are being answered, which is all at once: try again later",
                "server_error",
                code="too_many_requests",
                retry_after=5.0,
            )
            await error.response(scope, receive, send)
            return
        self._running += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._running -= 1


class Authentication:
    """Refuses requests without one of the keys, before any of their body is read."""

    def __init__(self, app: ASGIApp, keys: Keys | None) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["state"]["keyed"] = self._keys is not None
            if self._keys is None:
                scope["state"]["client"] = (scope.get("client") or ("local", 0))[0]
            elif not OPEN_PATHS.fullmatch(scope["path"]):
                name = self._keys.name(_header(scope, b"authorization"))
                if name is None:
                    error = ApiError(
                        401,
                        "the API key is missing or wrong: send it as 'Authorization: Bearer KEY'",
                        code="invalid_api_key",
                        headers={"WWW-Authenticate": "Bearer"},
                    )
                    await error.response(scope, receive, send)
                    return
                scope["state"]["client"] = name
        await self._app(scope, receive, send)


class BodyLimits:
    """Refuses bodies over a size, and clients that send one too slowly."""

    def __init__(
        self,
        app: ASGIApp,
        max_bytes: int,
        chunk_seconds: float = CHUNK_SECONDS,
        body_seconds: float = BODY_SECONDS,
    ) -> None:
        self._app, self._max_bytes = app, max_bytes
        self._chunk_seconds, self._body_seconds = chunk_seconds, body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = _header(scope, b"content-length") or "0"
        if not length.isdigit() or int(length) > self._max_bytes:
            await self._too_large().response(scope, receive, send)
            return
        body = _LimitedBody(
            receive, self._too_large(), self._max_bytes, self._chunk_seconds, self._body_seconds
        )
        try:
            await self._app(scope, body.receive, send)
        except ApiError as error:  # raised where the framework does not answer it
            with contextlib.suppress(RuntimeError):  # the answer had begun
                await error.response(scope, receive, send)

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the body is larger than the {self._max_bytes} bytes that are accepted",
            code="body_too_large",
        )


class _LimitedBody:
    def __init__(
        self, receive: Receive, too_large: ApiError, max_bytes: int, chunk_seconds: float, body_seconds: float
    ) -> None:
        self._receive, self._too_large, self._left = receive, too_large, max_bytes
        self._chunk_seconds, self._end = chunk_seconds, time.monotonic() + body_seconds
        self._complete = False

    async def receive(self) -> Message:
        if self._complete:  # what follows is the client's going, at any time
            return await self._receive()
        wait = max(0.0, min(self._chunk_seconds, self._end - time.monotonic()))
        try:
            message = await asyncio.wait_for(self._receive(), wait)
        except (asyncio.TimeoutError, TimeoutError):
            raise ApiError(
                408,
                "the body came too slowly: send it at once",
                code="body_too_slow",
                headers={"Connection": "close"},
            ) from None
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            raise self._too_large
        self._complete = not message.get("more_body", False)
        return message


def _header(scope: Scope, name: bytes) -> str | None:
    found: Any = next((value for key, value in scope["headers"] if key == name), None)
    return None if found is None else found.decode("latin-1")
