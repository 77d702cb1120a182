"""A server of ours to put the load on, and the same prompts in one call of `generate`."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx

from blip3o_rt.errors import Blip3oError
from blip3o_rt.params import DIFFUSION_NAMES, SAMPLING_NAMES, named

LOAD_SECONDS = 1800.0


@contextmanager
def local_server(arguments: Sequence[str]) -> Iterator[str]:
    """The address of a server that runs within the block; arguments are further ones of `blip3o-rt serve`."""
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


def one_call(
    model: dict[str, Any], prompts: Sequence[str], seed: int, body: dict[str, Any]
) -> dict[str, float]:
    """Images a second of one call of `generate`, and when its first image was there.

    Args:
        model: Arguments of Pipeline.load.
        prompts: As many as images.
        seed: Of every image: one call has one seed.
        body: Fields of the requests; those that `generate` takes too are given to it.
    """
    from blip3o_rt.pipeline import Pipeline

    options = named(body, (*DIFFUSION_NAMES, *SAMPLING_NAMES))
    pipeline = Pipeline.load(**model)
    pipeline.generate(prompts[0], seed=seed, **options)  # as the server has been warmed
    first: list[float] = []
    begin = time.perf_counter()
    pipeline.generate(
        list(prompts), seed=seed, on_image=lambda *_: first.append(time.perf_counter() - begin), **options
    )
    seconds = time.perf_counter() - begin
    return {"images_per_second": len(prompts) / seconds, "first_image": first[0], "seconds": seconds}
