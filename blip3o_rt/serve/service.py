"""Image requests of HTTP on the engine: what goes in, what comes out as a body or as events."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from blip3o_rt.errors import Blip3oError
from blip3o_rt.serve.api_error import CLIENT_GONE, ApiError, api_error
from blip3o_rt.serve.client import CANCELLED, EngineClient, Handle
from blip3o_rt.serve.events import EventStream, gone
from blip3o_rt.serve.images import ImageWorkers
from blip3o_rt.serve.messages import Event, Finished, Partial, Progress, RawImage
from blip3o_rt.serve.metrics import Metrics
from blip3o_rt.serve.schema import (
    ImageData,
    ImageRequest,
    ImagesResponse,
    InputTokensDetails,
    StreamedRequest,
    Usage,
)
from blip3o_rt.serve.store import Store

GENERATION, EDIT = "image_generation", "image_edit"
POSITION_SECONDS = 1.0  # between two events of the queue position


@dataclass
class Service:
    """What the routes work with.

    Args:
        client: The engine.
        workers: Decode and encode images.
        store: Keeps jobs, and images that are linked.
        metrics: What is counted.
        max_images: Images of a request.
        max_steps: Denoising steps of an image.
        log_prompts: Whether the log names prompts.
    """

    client: EngineClient
    workers: ImageWorkers
    store: Store
    metrics: Metrics
    max_images: int
    max_steps: int
    log_prompts: bool

    def check(self, request: ImageRequest) -> None:
        """Refuse what this server or its model does not take. Raises ApiError."""
        if request.n > self.max_images:
            raise _invalid("n", f"n is {request.n}: accepted is 1 to {self.max_images}")
        if request.steps > self.max_steps:
            raise _invalid("steps", f"steps is {request.steps}: accepted is 1 to {self.max_steps}")
        info = self.client.info
        if info is None:
            return
        if request.model not in (None, info.name):
            raise ApiError(
                404,
                f"the model {request.model!r} is not here: accepted is {info.name!r}",
                param="model",
                code="model_not_found",
            )
        if request.size not in ("auto", info.size):
            raise _invalid("size", f"size is {request.size!r}: accepted are 'auto' and {info.size!r}")

    async def respond(
        self, http: Request, request: StreamedRequest, references: tuple[RawImage, ...], kind: str
    ) -> Response | ImagesResponse:
        """Draw what a request asks for, and answer with a body or with events."""
        self.check(request)
        submit = request.submit(
            references,
            charged_to(http, request),
            partial_images=request.partial_images if request.stream else 0,
            progress=request.stream and request.progress,
        )
        try:
            handle = self.client.submit(submit, seconds=request.timeout)
        except Blip3oError as error:
            self.metrics.refused.labels(getattr(error, "kind", type(error).__name__)).inc()
            raise api_error(error) from None
        http.state.log = {"id": handle.submit.id, "n": request.n, "steps": request.steps}
        if self.log_prompts:
            http.state.log["prompt"] = request.prompt
        if request.stream:
            events = aiter(handle)
            # what is refused is refused with a status, not in a stream: the first event says it was accepted
            await self._until(http, handle, anext(events))
            return EventStream(
                self._events(events, handle, request, kind),
                lambda: self.client.cancel(handle, "the client is gone"),
            )
        return await self._until(http, handle, self._body(http, handle, request))

    async def _until(self, http: Request, handle: Handle, work: Any) -> Any:
        """Wait for work on a request, unless its client goes first. Raises ApiError."""
        task = asyncio.ensure_future(work)
        watcher = asyncio.ensure_future(gone(http.receive))
        try:
            await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                http.state.status = CLIENT_GONE
                raise ApiError(CLIENT_GONE, "the client closed the connection", "cancelled", code="cancelled")
            return task.result()
        except Blip3oError as error:
            raise self._error(error) from None
        finally:
            watcher.cancel()
            if not task.done() or task.cancelled() or task.exception() is not None:
                task.cancel()
                self.client.cancel(handle, "the client is gone")

    def _error(self, error: Blip3oError) -> ApiError:
        if getattr(error, "state", None) == CANCELLED:  # not by the client, who waits
            return ApiError(503, str(error), "server_error", code="cancelled", retry_after=5.0)
        return api_error(error)

    async def _body(self, http: Request, handle: Handle, request: StreamedRequest) -> ImagesResponse:
        async for _ in handle:
            pass
        files = {}
        for index, _ in handle.submit.seeds:
            image = handle.images[index].image
            files[index] = await self.workers.encode(image, request.output_format, request.output_compression)
        data = []
        for index, seed in handle.submit.seeds:
            entry = image_data(handle, handle.images[index], seed)
            if request.response_format == "url":
                name = await self.store.link(files[index], request.output_format)
                entry.url = str(http.base_url) + f"v1/results/{name}"
            else:
                entry.b64_json = base64.b64encode(files[index]).decode()
            data.append(entry)
        return ImagesResponse(
            created=int(time.time()),
            output_format=request.output_format,
            size=handle.images[0].image.size,
            data=data,
            usage=self.usage(handle, len(handle.submit.seeds)),
        )

    async def _events(
        self, events: AsyncIterator[Event], handle: Handle, request: StreamedRequest, kind: str
    ) -> AsyncIterator[dict[str, Any]]:
        """What a stream says of the events of a request that was accepted."""
        seeds = dict(handle.submit.seeds)
        common = {"background": "opaque", "output_format": request.output_format, "quality": "auto"}
        position = asyncio.ensure_future(self._positions(handle, kind)) if request.progress else None
        try:
            async for event in events:
                if isinstance(event, Partial | Finished):
                    data = await self.workers.encode(
                        event.image, request.output_format, request.output_compression
                    )
                    yield {
                        "type": f"{kind}.{'partial_image' if isinstance(event, Partial) else 'completed'}",
                        "b64_json": base64.b64encode(data).decode(),
                        "created_at": int(time.time()),
                        "size": event.image.size,
                        **common,
                        "index": event.index,
                        "seed": seeds[event.index],
                        **self._particulars(handle, event),
                    }
                elif isinstance(event, Progress):
                    yield {
                        "type": f"{kind}.progress",
                        "index": event.index,
                        "stage": event.stage,
                        "done": event.done,
                        "total": event.total,
                    }
                elif isinstance(event, QueuePosition):
                    yield {"type": f"{kind}.queued", "position": event.position}
        except Blip3oError as error:
            yield {"type": "error", "error": self._error(error).body}
        finally:
            if position is not None:
                position.cancel()

    def _particulars(self, handle: Handle, event: Partial | Finished) -> dict[str, Any]:
        if isinstance(event, Partial):
            return {"partial_image_index": event.number}
        data = image_data(handle, event, 0)
        return {
            "usage": self.usage(handle, 1).model_dump(),
            "seconds": data.seconds,
            "tokens_per_pass": data.tokens_per_pass,
        }

    async def _positions(self, handle: Handle, kind: str) -> None:
        """Put the queue position among a request's events, until it starts."""
        before = None
        while handle.started is None and handle.state is None:
            now = self.client.position(handle)
            if now != before and handle.accepted is not None:
                handle.events.put_nowait(QueuePosition(handle.submit.id, now))  # type: ignore[arg-type]
                before = now
            await asyncio.sleep(POSITION_SECONDS if before is not None else 0.05)

    def usage(self, handle: Handle, images: int) -> Usage:
        """Tokens read and drawn."""
        read = handle.accepted.prompt_tokens if handle.accepted is not None else 0
        per_image = self.client.info.tokens_per_image if self.client.info is not None else 0
        of_images = min(read, per_image * len(handle.submit.references))
        details = InputTokensDetails(text_tokens=read - of_images, image_tokens=of_images)
        drawn = per_image * images
        return Usage(
            input_tokens=read, input_tokens_details=details, output_tokens=drawn, total_tokens=read + drawn
        )


@dataclass(frozen=True)
class QueuePosition:
    """How many images are in front of a request."""

    id: str
    position: int


def charged_to(http: Request, request: ImageRequest) -> str:
    """Whom a request is charged to: the key's name or the address, and the user it names."""
    client = str(http.state.client)
    return f"{client}/{request.user}" if request.user else client


def image_data(handle: Handle, event: Finished, seed: int) -> ImageData:
    """What is said of an image beside itself."""
    queue = 0.0 if handle.started is None else handle.started - handle.came
    seconds = {"queue": queue, **event.seconds}
    return ImageData(
        seed=seed,
        seconds={name: round(value, 4) for name, value in seconds.items()},
        tokens_per_pass=round(event.tokens_per_pass, 3),
    )


def _invalid(param: str, message: str) -> ApiError:
    return ApiError(400, message, param=param, code="invalid_value")
