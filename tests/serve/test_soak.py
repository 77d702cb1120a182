"""Many requests of every kind at once on the embedded model: each ends once, with a single call's bits."""

from __future__ import annotations

import asyncio
import base64
import io
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

from blip3o_rt.pipeline import Pipeline
from tests.serve.conftest import ServerProcess

pytestmark = pytest.mark.exhaustive

GENERATIONS, EDITS, JOBS = "/v1/images/generations", "/v1/images/edits", "/v1/jobs"
PROMPTS = ("a red circle on a blue background", "a green square", "a yellow triangle on a black background")
CHANGE = "make the circle green"
SEEDS = range(4)
STEPS = 2
SECONDS = 1500.0  # for anything, on a machine that does other things too


@pytest.fixture(scope="module")
def real() -> Iterator[ServerProcess]:
    limits = ["--max-queue", "2000", "--max-queue-per-client", "2000", "--timeout", str(int(SECONDS))]
    server = ServerProcess(*limits, "--max-pixels", "1", "--max-batch", "8").wait_ready()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def expected() -> dict[tuple[str, int], bytes]:
    """The pixels of single calls, by prompt and seed; edits are of the first prompt's first image."""
    pipeline = Pipeline.load(max_batch=8)
    found = {
        (prompt, seed): pipeline.generate(prompt, seed=seed, steps=STEPS)[0].tobytes()
        for prompt in PROMPTS
        for seed in SEEDS
    }
    reference = Image.frombytes("RGB", (64, 64), found[PROMPTS[0], 0])
    for seed in SEEDS:
        found[CHANGE, seed] = pipeline.edit(CHANGE, reference, seed=seed, steps=STEPS)[0].tobytes()
    return found


class Load:
    """A mix of requests, drawn from a seed, and how each of them ended for its client."""

    def __init__(self, url: str, expected: dict[tuple[str, int], bytes], seed: int) -> None:
        self.random = random.Random(seed)
        self.expected, self.ends = expected, Counter[str]()
        limits = httpx.Limits(max_connections=None)
        self.http = httpx.AsyncClient(base_url=url, timeout=SECONDS, limits=limits)
        file = io.BytesIO()
        Image.frombytes("RGB", (64, 64), expected[PROMPTS[0], 0]).save(file, "PNG")
        self.reference = file.getvalue()

    async def run(self, count: int, cancelled: float) -> None:
        async with self.http:
            await asyncio.gather(*[self.one(self.random.random() < cancelled) for _ in range(count)])
        assert sum(self.ends.values()) == count

    async def one(self, gone: bool) -> None:
        kind = self.random.choice(("generate", "generate", "stream", "edit", "job", "malformed", "beyond"))
        seed, prompt = self.random.choice(SEEDS), self.random.choice(PROMPTS)
        after = self.random.uniform(0.0, 20.0)
        work = getattr(self, kind)(prompt, seed)
        if not gone or kind in ("job", "malformed", "beyond"):
            await work
            self.ends[kind] += 1
            return
        try:
            await asyncio.wait_for(work, after)
            self.ends[f"{kind} before it was cancelled"] += 1
        except asyncio.TimeoutError:
            self.ends[f"{kind} cancelled"] += 1

    async def generate(self, prompt: str, seed: int) -> None:
        n = self.random.choice((1, 1, 2)) if seed < len(SEEDS) - 1 else 1
        body = {"prompt": prompt, "seed": seed, "n": n, "steps": STEPS, "user": str(self.random.randrange(9))}
        answer = await self.http.post(GENERATIONS, json=body)
        assert answer.status_code == 200, answer.text
        for data in answer.json()["data"]:
            self.check(prompt, data["seed"], data["b64_json"])

    async def stream(self, prompt: str, seed: int) -> None:
        body = {
            "prompt": prompt,
            "seed": seed,
            "steps": STEPS,
            "stream": True,
            "partial_images": 1,
            "progress": True,
        }
        async with self.http.stream("POST", GENERATIONS, json=body) as answer:
            assert answer.status_code == 200
            text = (await answer.aread()).decode()
        types = re.findall(r"^event: image_generation\.(\w+)$", text, re.MULTILINE)
        assert types.count("completed") == 1
        assert types[-1] == "completed"
        self.check(prompt, seed, re.findall(r'"b64_json":"([^"]+)"', text)[-1])

    async def edit(self, prompt: str, seed: int) -> None:
        data = {"prompt": CHANGE, "seed": seed, "steps": STEPS}
        answer = await self.http.post(EDITS, data=data, files={"image": self.reference})
        assert answer.status_code == 200, answer.text
        self.check(CHANGE, seed, answer.json()["data"][0]["b64_json"])

    async def job(self, prompt: str, seed: int) -> None:
        answer = await self.http.post(JOBS, json={"prompt": prompt, "seed": seed, "steps": STEPS})
        assert answer.status_code == 202, answer.text
        url = f"{JOBS}/{answer.json()['id']}"
        if cancel := self.random.random() < 0.33:
            await self.http.post(f"{url}/cancel")
        while (found := (await self.http.get(url)).json())["status"] in ("queued", "running"):
            await asyncio.sleep(1.0)
        assert found["status"] in (("completed", "cancelled") if cancel else ("completed",)), found
        if found["status"] == "completed":
            data = (await self.http.get(found["data"][0]["url"])).content
            self.check(prompt, seed, base64.b64encode(data).decode())

    async def malformed(self, prompt: str, seed: int) -> None:
        path, options = self.random.choice(
            (
                (GENERATIONS, {"content": b"{", "headers": {"Content-Type": "application/json"}}),
                (GENERATIONS, {"json": {"prompt": 3}}),
                (GENERATIONS, {"json": {"prompt": "<S0>"}}),
                (EDITS, {"data": {"prompt": prompt}, "files": {"image": b"no image"}}),
                (EDITS, {"data": {"prompt": prompt}, "files": {"image": self.reference[:-200]}}),
            )
        )
        assert (await self.http.post(path, **options)).status_code == 400

    async def beyond(self, prompt: str, seed: int) -> None:
        large = io.BytesIO()
        Image.new("RGB", (1100, 1000)).save(large, "PNG")
        path, options, status = self.random.choice(
            (
                (GENERATIONS, {"json": {"prompt": prompt, "n": 11}}, 400),
                (GENERATIONS, {"json": {"prompt": prompt, "steps": 101}}, 400),
                (GENERATIONS, {"json": {"prompt": "a word " * 3000}}, 400),
                (EDITS, {"data": {"prompt": prompt}, "files": {"image": large.getvalue()}}, 400),
            )
        )
        assert (await self.http.post(path, **options)).status_code == status

    def check(self, prompt: str, seed: int, data: str) -> None:
        image = Image.open(io.BytesIO(base64.b64decode(data)))
        assert np.asarray(image).tobytes() == self.expected[prompt, seed]


def assert_all_ended_once(server: ServerProcess) -> None:
    server.wait_until(lambda: server.health()["running"] + server.health()["waiting"] == 0, 60)
    health = server.health()
    assert (health["status"], health["engine_restarts"]) == ("ok", 0)


def loop_delay(before: dict[float, float], after: dict[float, float], quantile: float) -> float:
    """The upper edge of the bucket that holds the quantile of what was measured in between."""
    counts = {edge: after[edge] - before.get(edge, 0.0) for edge in after}
    return next(edge for edge, count in sorted(counts.items()) if count >= quantile * counts[float("inf")])


def buckets(server: ServerProcess) -> dict[float, float]:
    text = server.http.get("/metrics").text
    found = re.findall(r'^blip3o_event_loop_delay_seconds_bucket\{le="([^"]+)"\} (\S+)$', text, re.MULTILINE)
    return {float(edge): float(count) for edge, count in found}


def test_five_hundred_at_once(real: ServerProcess, expected: Any) -> None:
    before, begin = buckets(real), time.monotonic()
    load = Load(real.url, expected, 1)
    asyncio.run(load.run(500, 1 / 3))
    assert_all_ended_once(real)
    delay = loop_delay(before, buckets(real), 0.99)
    print(f"\n{time.monotonic() - begin:.0f} s, {dict(load.ends)}, event loop delay p99 <= {delay} s")
    ends = real.metric("blip3o_requests_total")
    assert ends == sum(
        real.metric(f'blip3o_requests_total{{reason="{r}"') for r in ("", "Cancelled", "PromptError")
    )


def test_memory_is_flat_after_two_thousand_more(real: ServerProcess, expected: Any) -> None:
    def memory() -> tuple[int, int]:
        engine = psutil.Process(real.health()["engine_pid"]).memory_info().rss
        return psutil.Process(real.process.pid).memory_info().rss, engine

    async def batch(seed: int) -> None:
        await Load(real.url, expected, seed).run(250, 1 / 3)

    for seed in range(2):  # what is kept for good is allocated by then
        asyncio.run(batch(10 + seed))
    before = memory()
    for seed in range(8):
        asyncio.run(batch(20 + seed))
    assert_all_ended_once(real)
    grown = [(now - then) / 2**20 for then, now in zip(before, memory(), strict=True)]
    print(f"\nfront {grown[0]:+.1f} MiB, engine {grown[1]:+.1f} MiB")
    assert max(grown) < 32  # 2,000 leaked results of 12 KB would be 24 MB in the engine alone
