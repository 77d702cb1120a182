"""A server of ours to put the load on, in turns with one call of `generate` with the same prompts."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import httpx

from blip3o_rt.errors import Blip3oError
from blip3o_rt.measure.serve.load import Load, Sample, run
from blip3o_rt.params import DIFFUSION_NAMES, SAMPLING_NAMES, named

LOAD_SECONDS = 1800.0


@contextmanager
def local_server(arguments: Sequence[str]) -> Iterator[str]:
    """The address of a server that runs within the block; arguments are further ones of `blip3o-rt serve`."""
    fixed = ["--port", "0", "--log-level", "warning"]
    command = [sys.executable, "-m", "blip3o_rt", "serve", *fixed, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        words = process.stdout.readline().split()
        if not words:
            raise Blip3oError("the server did not start: see what it says above")
        url = words[1].rstrip("/")
        _wait_ready(url)
        yield url
    finally:
        process.terminate()
        process.wait()


def _wait_ready(url: str) -> None:
    end = time.monotonic() + LOAD_SECONDS
    while httpx.get(f"{url}/ready").status_code != 200:
        health = httpx.get(f"{url}/health").json()
        if health["status"] == "failing" or time.monotonic() > end:
            raise Blip3oError(f"the server's engine did not start: {health['message']}")
        time.sleep(0.1)


def measure(
    load: Load, warm_up: int, rounds: int, call: Callable[[], dict[str, float]] | None
) -> tuple[list[Sample], list[dict[str, float]]]:
    """Send so many requests unmeasured, then the load in turns with a call.

    Returns the samples of all rounds, and what the calls returned.
    """
    samples, calls = [], []
    if warm_up:
        asyncio.run(run(replace(load, requests=warm_up)))
    for number in range(rounds):
        samples += [replace(sample, round=number) for sample in asyncio.run(run(load))]
        calls += [] if call is None else [call()]
    return samples, calls


def one_call(
    model: dict[str, Any], prompts: Sequence[str], n: int, seed: int, body: dict[str, Any]
) -> Callable[[], dict[str, float]]:
    """What makes one call of `generate` and says its images a second, and when its first image was there.

    It has been made once, as the server has been warmed.

    Args:
        model: Arguments of Pipeline.load.
        prompts: Those of the load.
        n: Images of each prompt.
        seed: Of every prompt's first image.
        body: Fields of the requests; those that `generate` takes too are given to it.
    """
    from blip3o_rt.pipeline import Pipeline

    options = named(body, (*DIFFUSION_NAMES, *SAMPLING_NAMES))
    pipeline = Pipeline.load(**model)

    def call() -> dict[str, float]:
        ended: list[float] = []
        clock, begin = time.perf_counter, time.perf_counter()
        pipeline.generate(
            [*prompts], n=n, seed=seed, on_image=lambda *_: ended.append(clock() - begin), **options
        )
        seconds = clock() - begin
        return {"images_per_second": len(ended) / seconds, "first_image": ended[0], "seconds": seconds}

    call()
    return call
