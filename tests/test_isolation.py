"""Requests do not disturb each other or the program: threads, callbacks, forks, torch's settings."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel

from blip3o_rt.config import EditConfig
from blip3o_rt.errors import Cancelled, ForkError, PromptError
from blip3o_rt.graphs import GraphRunner
from blip3o_rt.isolation import FairLock
from blip3o_rt.machine import exact_arithmetic
from blip3o_rt.measure.random_checkpoint import preset, write_random_checkpoint
from blip3o_rt.pipeline import Pipeline
from blip3o_rt.result import Progress
from tests.captured_graph import CapturedGraphs
from tests.warm import run_python

BOTH = EditConfig(use_und_image_vae=True, use_und_image_vae_as_noise=True)
PROMPTS = ["a red circle", "two green squares on a blue background", "a"]
THREADS = 8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    write_random_checkpoint(folder, preset("tiny", BOTH), seed=1)
    return folder


@pytest.fixture(scope="module")
def pipeline(checkpoint: Path) -> Pipeline:
    return Pipeline.load(checkpoint, device="cpu", dtype="fp32")


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return Image.fromarray(np.arange(48 * 80 * 3, dtype=np.uint8).reshape(48, 80, 3))


# The lock


def test_threads_get_the_lock_in_the_order_they_asked() -> None:
    lock, order = FairLock(), []

    def take(number: int) -> None:
        with lock:
            order.append(number)

    threads = [threading.Thread(target=take, args=(number,)) for number in range(20)]
    with lock:
        for number, thread in enumerate(threads):
            thread.start()
            while len(lock._threads) < number + 2:
                time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert order == list(range(20))
    assert not lock.taken


def test_the_lock_is_reentrant_and_left_after_an_error() -> None:
    lock = FairLock()
    with pytest.raises(KeyError), lock, lock:
        raise KeyError
    assert not lock.taken


def test_a_turn_that_another_thread_ends_is_over() -> None:
    lock = FairLock()
    thread = threading.Thread(target=lock.__enter__)
    thread.start()
    thread.join()
    lock.__exit__()
    assert not lock.taken
    with lock:
        assert lock.taken


def test_a_thread_that_is_interrupted_while_it_waits_leaves_the_queue() -> None:
    code = """
import os, signal, threading, time
from blip3o_rt.isolation import FairLock
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background has it ignored
lock, held, left = FairLock(), threading.Event(), threading.Event()
def hold():
    with lock:
        held.set()
        while len(lock._threads) < 2: time.sleep(0.01)
        time.sleep(0.1)  # it waits by now
        os.kill(os.getpid(), signal.SIGINT)
        left.wait()
threading.Thread(target=hold).start()
held.wait()
try:
    with lock: pass
except KeyboardInterrupt:
    print("interrupted", len(lock._threads))
    left.set()
with lock: print("again")
"""
    found = run_python(code)
    assert found.stdout.split() == ["interrupted", "1", "again"]


# Threads


def bits(result: Any) -> list[bytes]:
    """All of a request's results: images, tensors, or what it raised."""
    if isinstance(result, list):
        return [byte for one in result for byte in bits(one)]
    if isinstance(result, Exception):
        return [repr(result).encode()]
    return [result.tobytes() if isinstance(result, Image.Image) else result.float().numpy().tobytes()]


def cancelled_at(stage: str, done: int) -> Callable[[Progress], bool]:
    return lambda progress: not (progress.stage == stage and progress.done == done)


def requests(pipeline: Pipeline, image: Image.Image) -> list[Callable[[], Any]]:
    """One of each kind, all deterministic; what fails is a result too."""

    def caught(request: Callable[[], Any], error: type[Exception]) -> Callable[[], Any]:
        def run() -> Any:
            with pytest.raises(error) as found:
                request()
            return found.value

        return run

    plan = pipeline.plan("a plan of its own", seed=4)
    tokens = plan.token_ids

    def planned() -> list[torch.Tensor]:
        found = pipeline.plan(PROMPTS[1], seed=9)
        return [found.token_ids, found.hidden_states]

    return [
        lambda: pipeline.generate(PROMPTS[0], n=2, seed=7, steps=2),
        lambda: pipeline.generate(PROMPTS[:2], seed=3, steps=1),
        lambda: pipeline.generate(PROMPTS[2], seed=1, steps=3, image_tokens_only=False),
        lambda: pipeline.edit("make it green", image, n=2, seed=5, steps=2),
        planned,
        lambda: pipeline.plan(PROMPTS[0], token_ids=tokens).hidden_states,
        lambda: pipeline.render(plan, seed=2, steps=2, output="tensor"),
        lambda: pipeline.render(plan, steps=1),
        caught(lambda: pipeline.generate(PROMPTS[1], callback=cancelled_at("tokens", 5)), Cancelled),
        caught(lambda: pipeline.generate(PROMPTS[0], callback=cancelled_at("denoise", 1)), Cancelled),
        caught(lambda: pipeline.generate("<im_start>"), PromptError),
    ]


@pytest.mark.parametrize("number", [33, pytest.param(200, marks=pytest.mark.exhaustive)])
def test_many_requests_of_many_threads_are_those_of_single_calls(
    pipeline: Pipeline, image: Image.Image, number: int
) -> None:
    kinds = requests(pipeline, image)
    alone = [bits(request()) for request in kinds]
    order = [place % len(kinds) for place in range(number)]
    random.Random(0).shuffle(order)
    with ThreadPoolExecutor(THREADS) as executor:
        together = list(executor.map(lambda kind: bits(kinds[kind]()), order))
    wrong = [kind for kind, found in zip(order, together, strict=True) if found != alone[kind]]
    assert wrong == []
    assert pipeline._planner.engine.cache.free_pages == pipeline._planner.engine.cache.num_pages


def test_a_request_that_asyncio_gave_up_on_does_not_spoil_the_next(pipeline: Pipeline) -> None:
    wanted = bits(pipeline.generate(PROMPTS[0], seed=3, steps=2))

    async def main() -> list[list[bytes]]:
        found = []
        for _ in range(4):
            slow = asyncio.to_thread(pipeline.generate, PROMPTS[1], seed=9, steps=60)
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(slow, 0.02)
            found.append(bits(await asyncio.to_thread(pipeline.generate, PROMPTS[0], seed=3, steps=2)))
        return found

    assert asyncio.run(main()) == [wanted] * 4


def test_two_pipelines_run_side_by_side(checkpoint: Path, pipeline: Pipeline) -> None:
    other = Pipeline.load(checkpoint, device="cpu", dtype="bf16")
    started = threading.Barrier(2, timeout=60)

    def request(chosen: Pipeline) -> list[bytes]:
        def meet(progress: Progress) -> None:
            if progress.done == 1:
                started.wait()  # passed only where both are within a request

        return bits(chosen.generate(PROMPTS[0], seed=3, steps=2, callback=meet))

    alone = [bits(chosen.generate(PROMPTS[0], seed=3, steps=2)) for chosen in (pipeline, other)]
    with ThreadPoolExecutor(2) as executor:
        assert list(executor.map(request, (pipeline, other))) == alone


@pytest.mark.parametrize("stage", ["tokens", "denoise"])
@pytest.mark.parametrize("captured", [False, True])
def test_a_callback_may_make_requests(checkpoint: Path, stage: str, captured: bool) -> None:
    pipeline = Pipeline.load(checkpoint, device="cpu", dtype="fp32")
    alone = [bits(pipeline.generate(prompt, seed=3, steps=3)) for prompt in PROMPTS[:2]]
    if captured:
        pipeline = Pipeline(pipeline_checkpoint(checkpoint), runner=GraphRunner(CapturedGraphs()))
        pipeline.warm_up()
    inner: list[list[bytes]] = []

    def callback(progress: Progress) -> None:
        if (progress.stage, progress.done) == (stage, 2):
            inner.append(bits(pipeline.generate(PROMPTS[1], seed=3, steps=3)))

    assert bits(pipeline.generate(PROMPTS[0], seed=3, steps=3, callback=callback)) == alone[0]
    assert inner == [alone[1]]


def pipeline_checkpoint(folder: Path) -> Any:
    from blip3o_rt.checkpoint.load import load_checkpoint

    return load_checkpoint(folder, dtype=torch.float32)


# Forks


FORK = """
import os, sys, torch
torch.set_num_threads({threads})
from blip3o_rt import Pipeline
from blip3o_rt.errors import ForkError
pipe = Pipeline.load({checkpoint!r}, device="cpu", dtype="fp32")
wanted = pipe.generate("a", steps=1)[0].tobytes()
child = os.fork()
if child == 0:
    code = 1
    try:
        code = 10 if {call}[0].tobytes() == wanted else 2
    except ForkError as error:
        code = 11 if "spawn" in str(error) and "\\n" not in str(error) else 3
    finally:
        os._exit(code)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.parametrize(
    ("threads", "call", "outcome"),
    [
        (2, 'pipe.generate("a", steps=1)', "11"),
        (2, 'Pipeline.load({checkpoint!r}, device="cpu").generate("a", steps=1)', "11"),
        (1, 'pipe.generate("a", steps=1)', "10"),
    ],
)
def test_a_forked_child_draws_or_is_refused_and_never_hangs(
    checkpoint: Path, threads: int, call: str, outcome: str
) -> None:
    call = call.format(checkpoint=str(checkpoint))
    code = FORK.format(threads=threads, checkpoint=str(checkpoint), call=call)
    found = run_python(code)
    assert found.stdout.split() == [outcome], found.stderr


def test_a_child_that_is_forked_within_a_request_is_refused(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline._isolation, "_threads", 1)
    refused: list[str] = []

    def callback(progress: Progress) -> None:
        monkeypatch.setattr(os, "getpid", lambda: -1)  # as in the child: its lock is a copy, never given back
        try:
            pipeline.plan("a")
        except ForkError as error:
            refused.append(str(error))
        monkeypatch.undo()
        raise StopIteration

    with pytest.raises(StopIteration):
        pipeline.plan("a", callback=callback)
    assert "spawn" in refused[0]


def test_a_spawned_child_draws(checkpoint: Path, pipeline: Pipeline) -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(draw_in_child, (checkpoint,))
    assert found == pipeline.generate("a", seed=3, steps=1)[0].tobytes()


def draw_in_child(checkpoint: Path) -> bytes:
    return Pipeline.load(checkpoint, device="cpu", dtype="fp32").generate("a", seed=3, steps=1)[0].tobytes()


# Torch's settings


@contextmanager
def flushed_denormals() -> Iterator[None]:
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@contextmanager
def restored(get: Callable[[], Any], put: Callable[[Any], None], value: Any) -> Iterator[None]:
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


@contextmanager
def warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "meta device": lambda: torch.device("meta"),
    "default device": lambda: restored(lambda: None, torch.set_default_device, "meta"),
    "float64": lambda: restored(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "bfloat16": lambda: restored(torch.get_default_dtype, torch.set_default_dtype, torch.bfloat16),
    "deterministic": lambda: restored(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    ),
    "matmul precision": lambda: restored(
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"
    ),
    "threads": lambda: restored(torch.get_num_threads, torch.set_num_threads, 3),
    "denormals": flushed_denormals,
    "oneDNN off": lambda: torch.backends.mkldnn.flags(enabled=False),
    "attention kernels": lambda: sdpa_kernel(SDPBackend.MATH),
    "warnings are errors": warnings_are_errors,
    "numpy errors": lambda: np.errstate(all="raise"),
}


def everything(pipeline: Pipeline, image: Image.Image) -> list[bytes]:
    plan = pipeline.plan("a red circle", seed=3)
    edit = pipeline.plan("make it green", image=image, seed=3)
    replayed = pipeline.plan("a red circle", token_ids=plan.token_ids)
    latents = [pipeline.render(one, steps=1, output="latent") for one in (plan, edit)]
    pixels = pipeline.render(plan, steps=2, output="tensor")
    return bits([plan.hidden_states, edit.hidden_states, replayed.hidden_states, *latents, pixels])


@pytest.fixture(scope="module")
def wanted(checkpoint: Path, image: Image.Image) -> dict[str, list[bytes]]:
    """What `everything` gives by dtype where nothing is set."""
    return {
        dtype: everything(Pipeline.load(checkpoint, device="cpu", dtype=dtype), image)
        for dtype in ("fp32", "bf16")
    }


OF_DTYPES = ("autocast", "bfloat16", "denormals", "oneDNN off")  # settings that could touch bfloat16 alone


@pytest.mark.parametrize(
    ("setting", "dtype"),
    [
        pytest.param(
            setting,
            dtype,
            id=f"{setting}-{dtype}",
            marks=() if dtype == "fp32" or setting in OF_DTYPES else pytest.mark.exhaustive,
        )
        for setting in SETTINGS
        for dtype in ("fp32", "bf16")
    ],
)
def test_the_callers_settings_change_no_image_and_break_no_call(
    checkpoint: Path, image: Image.Image, wanted: dict[str, list[bytes]], setting: str, dtype: str
) -> None:
    used_first = Pipeline.load(checkpoint, device="cpu", dtype=dtype)
    threads, default = torch.get_num_threads(), torch.get_default_dtype()
    with SETTINGS[setting]():
        assert everything(used_first, image) == wanted[dtype]
        loaded_within = Pipeline.load(checkpoint, device="cpu", dtype=dtype)
    assert (torch.get_num_threads(), torch.get_default_dtype()) == (threads, default)
    assert everything(used_first, image) == wanted[dtype]
    if setting != "threads":  # those at loading are the pipeline's
        assert everything(loaded_within, image) == wanted[dtype]


def test_the_callers_random_numbers_are_left_alone(checkpoint: Path, image: Image.Image) -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
    everything(Pipeline.load(checkpoint, device="cpu", dtype="fp32"), image)
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_results_of_inference_mode_can_be_trained_on_outside(pipeline: Pipeline) -> None:
    with torch.inference_mode():
        plan = pipeline.plan("a", seed=1)
        pixels = pipeline.render(plan, steps=1, output="tensor")
    assert isinstance(pixels, torch.Tensor)
    scale = torch.ones(1, requires_grad=True)
    (plan.hidden_states.sum() * scale + pixels.sum() * scale).backward()
    assert scale.grad is not None


def test_a_callback_runs_under_its_callers_settings(pipeline: Pipeline) -> None:
    seen: set[tuple[object, ...]] = set()

    def look(*_: object) -> None:
        seen.add((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_num_threads()))

    with restored(torch.get_num_threads, torch.set_num_threads, 3), torch.autocast("cpu"):
        pipeline.generate("a", steps=1, callback=look, on_image=look)
    assert seen == {(True, True, 3)}


def test_precision_of_the_process_is_put_back_by_the_last_to_leave() -> None:
    cpu, matmul = torch.device("cpu"), torch.backends.mkldnn.matmul
    inside, leave = threading.Event(), threading.Event()

    def stay() -> None:
        with exact_arithmetic(cpu):
            inside.set()
            leave.wait(60)

    with restored(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"):
        with exact_arithmetic(cpu):
            other = threading.Thread(target=stay)
            other.start()
            assert inside.wait(60)
        assert matmul.fp32_precision == "ieee"  # the first one has left, the other has not
        leave.set()
        other.join()
        assert matmul.fp32_precision == "bf16"
