"""Server-sent events: a request's images and previews as they come, to a client that may go at any time."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

KEEP_ALIVE_SECONDS = 15.0
SEND_SECONDS = 60.0  # that a client may take to read what it was sent


class EventStream(Response):
    """A response of events; `close` is called once it is over, however that came about.

    Args:
        events: Yields the data of every event; its `type` is the event's name too.
        close: Ends what the events come from.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[dict[str, Any]], close: Any) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._close = events, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sender = asyncio.ensure_future(self._send(send))
        watcher = asyncio.ensure_future(gone(receive))
        try:
            await asyncio.wait({sender, watcher}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._close()
            for task in (sender, watcher):
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError, asyncio.TimeoutError, TimeoutError):
                await sender
            with contextlib.suppress(asyncio.CancelledError):
                await watcher

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        step = asyncio.ensure_future(anext(self._events))
        try:
            while True:
                done, _ = await asyncio.wait({step}, timeout=KEEP_ALIVE_SECONDS)
                body = b": still here\n\n"
                if done:
                    try:
                        body = encoded(step.result())
                    except StopAsyncIteration:
                        break
                    step = asyncio.ensure_future(anext(self._events))
                message = {"type": "http.response.body", "body": body, "more_body": True}
                await asyncio.wait_for(send(message), SEND_SECONDS)
            await send({"type": "http.response.body", "body": b""})
        finally:
            step.cancel()


def encoded(data: dict[str, Any]) -> bytes:
    """One event as it is sent."""
    return f"event: {data['type']}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n".encode()


async def gone(receive: Receive) -> None:
    """Wait until the client has closed its connection; its body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass
