"""Sends requests to an images server, at a rate or so many at a time, and notes what every client saw."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx

CLOSED, OPEN = "closed", "open"


@dataclass(frozen=True)
class Load:
    """What is sent.

    Args:
        url: The server, without /v1.
        prompts: Taken in turn.
        requests: How many requests are measured.
        concurrency: Requests in flight of the closed loop; None is the open loop.
        rate: Requests a second of the open loop, at random (Poisson) moments; infinite sends all at once.
        body: Further fields of every request, for instance steps.
        seed: Of every prompt's first request, one more at its next; None leaves seeds out, for servers that
            know none.
        previews: Partial images to ask for; 0 does not stream.
        timeout: Seconds after which a request counts as failed.
        key: Bearer key.
    """

    url: str
    prompts: Sequence[str]
    requests: int = 32
    concurrency: int | None = 8
    rate: float = 1.0
    body: dict[str, Any] = field(default_factory=dict)
    seed: int | None = 0
    previews: int = 1
    timeout: float = 600.0
    key: str | None = None

    @property
    def loop(self) -> str:
        """CLOSED or OPEN."""
        return OPEN if self.concurrency is None else CLOSED


@dataclass
class Sample:
    """One request as its client saw it; times are seconds since the load began."""

    number: int
    sent: float
    ended: float = 0.0
    preview: float | None = None
    queue: float | None = None
    images: int = 0
    status: int = 0
    error: str = ""
    round: int = 0

    @property
    def latency(self) -> float:
        """Seconds from sending to the last byte."""
        return self.ended - self.sent

    def row(self) -> dict[str, Any]:
        """The sample as a row of the CSV file."""
        first = None if self.preview is None else self.preview - self.sent
        return {**asdict(self), "latency": self.latency, "time_to_first_preview": first}


async def run(load: Load) -> list[Sample]:
    """Send the load; returns a sample of every request."""
    headers = {} if load.key is None else {"Authorization": f"Bearer {load.key}"}
    limits = httpx.Limits(max_connections=None)
    samples: list[Sample] = []
    async with httpx.AsyncClient(
        base_url=load.url, headers=headers, timeout=load.timeout, limits=limits
    ) as http:
        begin = time.perf_counter()  # of the load: making a client takes its time too

        async def one(number: int) -> None:
            sample = Sample(number, time.perf_counter() - begin)
            samples.append(sample)
            try:
                await _send(http, load, sample, begin)
            except (httpx.HTTPError, ValueError) as error:
                sample.error = type(error).__name__
            sample.ended = time.perf_counter() - begin

        if load.concurrency is None:
            await _open_loop(load, one)
        else:
            await _closed_loop(load, load.concurrency, one)
    return samples


async def _closed_loop(load: Load, concurrency: int, one: Any) -> None:
    numbers = iter(range(load.requests))

    async def client() -> None:
        for number in numbers:
            await one(number)

    await asyncio.gather(*[client() for _ in range(concurrency)])


async def _open_loop(load: Load, one: Any) -> None:
    chance = random.Random(0)
    tasks = []
    for number in range(load.requests):
        tasks.append(asyncio.create_task(one(number)))
        if load.rate != float("inf"):
            await asyncio.sleep(chance.expovariate(load.rate))
    await asyncio.gather(*tasks)


async def _send(http: httpx.AsyncClient, load: Load, sample: Sample, begin: float) -> None:
    body = {"prompt": load.prompts[sample.number % len(load.prompts)], **load.body}
    if load.seed is not None:
        body["seed"] = load.seed + sample.number // len(load.prompts)
    if load.previews:
        body |= {"stream": True, "partial_images": load.previews}
    async with http.stream("POST", "/v1/images/generations", json=body) as answer:
        sample.status = answer.status_code
        if answer.status_code != 200:
            found = json.loads(await answer.aread())
            sample.error = str(found.get("error", {}).get("code") or answer.status_code)
        elif load.previews:
            await _read_events(answer, sample, begin)
        else:
            data = json.loads(await answer.aread())["data"]
            sample.images = len(data)
            sample.queue = max((image.get("seconds", {}).get("queue", 0.0) for image in data), default=None)


async def _read_events(answer: httpx.Response, sample: Sample, begin: float) -> None:
    async for line in answer.aiter_lines():
        if not line.startswith("data: "):
            continue
        event = json.loads(line.removeprefix("data: "))
        kind = event["type"].rpartition(".")[2]
        if kind == "partial_image" and sample.preview is None:
            sample.preview = time.perf_counter() - begin
        elif kind == "completed":
            sample.images += 1
            sample.queue = event.get("seconds", {}).get("queue")
        elif kind == "error":
            sample.error = str(event["error"].get("code"))
