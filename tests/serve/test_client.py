"""The engine process kept running: ends, restarts, retries, deadlines; every request ends once."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from blip3o_rt.serve import client as client_module
from blip3o_rt.serve.client import (
    CANCELLED,
    COMPLETED,
    EXPIRED,
    FAILED,
    EngineClient,
    Handle,
    Limits,
    Refused,
    RequestError,
)
from blip3o_rt.serve.messages import EngineOptions, RawImage, Submit
from tests.serve.conftest import FAKES
from tests.serve.fakes import fake_image

STEPS = 4


class Engine:
    """An engine client whose ends are kept."""

    def __init__(self, model: dict[str, Any] | None = None, limits: Limits | None = None) -> None:
        self.ended: list[Handle] = []
        self.client = EngineClient(EngineOptions(model or {}, loader=FAKES), limits, self.ended.append)

    async def __aenter__(self) -> Engine:
        self.client.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.client.close()

    def submit(
        self, prompt: str = "a circle", n: int = 1, seed: int = 0, steps: int = STEPS, **options: Any
    ) -> Handle:
        seeds = tuple((index, seed + index) for index in range(n))
        return self.client.submit(Submit("", prompt, seeds=seeds, diffusion={"steps": steps}), **options)

    @property
    def pid(self) -> int:
        assert self.client.process is not None
        return self.client.process.pid

    async def until(self, condition: Callable[[], bool], seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, self.client.status
            await asyncio.sleep(0.01)


def run(test: Callable[[Engine], Awaitable[None]], *arguments: Any, ready: bool = True) -> None:
    async def main() -> None:
        async with Engine(*arguments) as engine:
            if ready:
                await engine.client.wait_ready()
            await test(engine)
            assert len({handle.submit.id for handle in engine.ended}) == len(engine.ended)

    asyncio.run(asyncio.wait_for(main(), 120))


async def end_of(handle: Handle) -> str:
    with contextlib.suppress(RequestError):
        async for _ in handle:
            pass
    assert handle.state is not None
    return handle.state


def assert_images(handle: Handle) -> None:
    for index, seed in handle.submit.seeds:
        assert handle.images[index].image.samples == fake_image(handle.submit.prompt, seed, STEPS)


def test_a_killed_engine_is_restarted_and_its_requests_are_finished() -> None:
    async def test(engine: Engine) -> None:
        handles = [engine.submit("slow circle", n=2, seed=number) for number in range(4)]
        await engine.until(lambda: any(handle.images for handle in handles))
        os.kill(engine.pid, signal.SIGKILL)
        await engine.until(lambda: engine.client.status == "restarting", 2)
        with pytest.raises(Refused, match="restarted"):
            engine.submit()
        assert [await end_of(handle) for handle in handles] == [COMPLETED] * 4
        for handle in handles:
            assert_images(handle)
        assert engine.client.restarts == 1
        assert engine.client.status == "ok"

    run(test)


@pytest.fixture
def two_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine takes seconds to start; two ends of it show what more would."""
    monkeypatch.setattr(client_module, "MAX_ATTEMPTS", 2)


@pytest.mark.usefixtures("two_attempts")
def test_a_request_that_ends_the_engine_fails_alone() -> None:
    async def test(engine: Engine) -> None:
        poison = engine.submit("crash")
        others = [engine.submit("slow circle", seed=number) for number in range(3)]
        assert await end_of(poison) == FAILED
        assert poison.error is not None
        assert poison.error.kind == "EngineLost"
        assert [await end_of(handle) for handle in others] == [COMPLETED] * 3
        for handle in others:
            assert_images(handle)
        assert engine.client.restarts == client_module.MAX_ATTEMPTS

    run(test)


def test_a_stopped_engine_is_seen_at_once_and_goes_on_where_it_was() -> None:
    async def test(engine: Engine) -> None:
        handle = engine.submit("slow circle")
        os.kill(engine.pid, signal.SIGSTOP)
        await engine.until(lambda: engine.client.status == "stopped", 2)
        with pytest.raises(Refused, match="stopped"):
            engine.submit()
        os.kill(engine.pid, signal.SIGCONT)
        assert await end_of(handle) == COMPLETED
        assert engine.client.restarts == 0

    run(test)


def test_an_engine_that_stays_silent_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "PATIENCE_SECONDS", 3.0)

    async def test(engine: Engine) -> None:
        handle = engine.submit("slow circle")
        os.kill(engine.pid, signal.SIGSTOP)
        assert await end_of(handle) == COMPLETED
        assert engine.client.restarts == 1

    run(test)


@pytest.mark.usefixtures("two_attempts")
def test_an_engine_that_hangs_while_its_heart_beats_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(engine: Engine) -> None:
        hung, waits = engine.submit("hang"), engine.submit("slow circle")
        with monkeypatch.context() as patched:
            patched.setattr(engine.client.process, "kill", lambda: None)
            await engine.until(lambda: engine.client.status == "stalled")
            with pytest.raises(Refused, match="does not answer"):
                engine.submit()
        assert await end_of(hung) == FAILED
        assert hung.error is not None
        assert hung.error.kind == "EngineLost"
        assert await end_of(waits) == COMPLETED
        assert engine.client.restarts == client_module.MAX_ATTEMPTS

    run(test, {}, Limits(stall_seconds=1.5))


def test_loading_for_long_is_no_hanging() -> None:
    async def test(engine: Engine) -> None:
        assert await end_of(engine.submit()) == COMPLETED
        assert engine.client.restarts == 0

    run(test, {"load_seconds": 2.5}, Limits(stall_seconds=1.0))


def test_an_engine_that_holds_its_interpreter_while_it_loads_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client_module, "QUIET_SECONDS", 0.5)
    monkeypatch.setattr(client_module, "PATIENCE_SECONDS", 1.0)

    async def test(engine: Engine) -> None:
        await engine.until(lambda: engine.client.process.heartbeat is not None)
        heard = engine.client.process.heard
        await engine.until(lambda: time.monotonic() - heard > 2.0)
        assert engine.client.status in ("loading", "ok")
        await engine.client.wait_ready()
        assert engine.client.restarts == 0

    run(test, {"load_seconds": 0.2, "load_holds_seconds": 4.0}, ready=False)


def test_an_engine_without_memory_for_a_message_is_ended() -> None:
    """It would go on to send heartbeats, and hear nothing."""

    async def test(engine: Engine) -> None:
        process = psutil.Process(engine.pid)
        most = process.memory_info().vms + 16 * 2**20
        process.rlimit(psutil.RLIMIT_AS, (most, most))
        side = 5000
        reference = RawImage(side, side, bytes(3 * side * side))
        submit = Submit("", "a circle", (reference,), ((0, 1),), diffusion={"steps": STEPS})
        handle = engine.client.submit(submit)
        assert await end_of(handle) == COMPLETED
        assert handle.attempts == engine.client.restarts == 1

    run(test)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_memory_that_runs_out_ends_the_engine_rather_than_the_front() -> None:
    async def test(engine: Engine) -> None:
        own, its = (int(Path(f"/proc/{pid}/oom_score_adj").read_text()) for pid in ("self", str(engine.pid)))
        assert its > own

    run(test)


def test_deadline_and_cancelling_end_a_request_whatever_the_engine_does() -> None:
    async def test(engine: Engine) -> None:
        late, gone = engine.submit("hang", seconds=0.3), engine.submit("slow circle")
        engine.client.cancel(gone)
        engine.client.cancel(gone)
        assert (await end_of(gone), await end_of(late)) == (CANCELLED, EXPIRED)
        assert [handle.state for handle in engine.ended] == [CANCELLED, EXPIRED]

    run(test)


def test_a_model_that_cannot_be_loaded_is_said_and_requests_do_not_wait_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client_module, "RESTART_SECONDS", (0.0,))

    async def test(engine: Engine) -> None:
        with pytest.raises(RequestError, match="no such folder"):
            await engine.client.wait_ready()
        job = engine.submit(durable=True)
        waiting = engine.submit(admitted=True)
        assert await end_of(waiting) == FAILED
        assert engine.client.status == "failing"
        with pytest.raises(Refused, match="no such folder"):
            engine.submit()
        assert job.state is None

    run(test, {"load_error": "no such folder"}, ready=False)


def test_an_engine_killed_while_it_loads_is_started_again() -> None:
    async def test(engine: Engine) -> None:
        assert engine.client.status == "loading"
        os.kill(engine.pid, signal.SIGKILL)
        await engine.until(lambda: engine.client.restarts == 1)
        await engine.until(lambda: engine.client.status == "ok")
        assert await end_of(engine.submit()) == COMPLETED

    run(test, {"load_seconds": 0.5}, ready=False)


def test_closing_leaves_no_process_and_ends_requests() -> None:
    async def test(engine: Engine) -> None:
        handle, pid = engine.submit("slow circle"), engine.pid
        await engine.client.close()
        assert await end_of(handle) == CANCELLED
        assert not psutil.pid_exists(pid)

    run(test)


FRONT = """
import asyncio, sys
from blip3o_rt.serve.client import EngineClient
from blip3o_rt.serve.messages import EngineOptions
async def main():
    client = EngineClient(EngineOptions(loader="tests.serve.fakes:load"))
    client.start()
    await client.wait_ready()
    print(client.process.pid, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


@pytest.mark.parametrize("stopped", [False, True])
def test_an_engine_dies_with_its_front(stopped: bool) -> None:
    async def main() -> None:
        front = await asyncio.create_subprocess_exec(
            sys.executable, "-c", FRONT, stdout=asyncio.subprocess.PIPE
        )
        assert front.stdout is not None
        pid = int(await front.stdout.readline())
        if stopped:
            os.kill(pid, signal.SIGSTOP)
        front.kill()
        await front.wait()
        end = time.monotonic() + 10
        while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < end
            await asyncio.sleep(0.02)

    asyncio.run(asyncio.wait_for(main(), 120))
