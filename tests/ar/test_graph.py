"""The token step as graphs: every replay draws what the same work draws without, whoever is in the batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TypeVar

import pytest
import torch

from blip3o_rt import ops
from blip3o_rt.ar.engine import Request, TokenEngine, TokenPrompt
from blip3o_rt.ar.token_step import LateCounts
from blip3o_rt.graphs import CudaGraphs, GraphRunner
from blip3o_rt.params import SamplingParams
from tests import captured_graph
from tests.ar import test_stress
from tests.ar.oracle import image_tokens, oracle, runtime_weights, small_config
from tests.ar.test_stress import Traffic
from tests.captured_graph import CapturedGraphs

R = TypeVar("R")
CONFIG = small_config(head_dim=64)  # which a GPU has a kernel for
TOKENS = image_tokens(CONFIG)
WEIGHTS = {dtype: runtime_weights(CONFIG, oracle(CONFIG), dtype) for dtype in (torch.float32, torch.bfloat16)}
COUNT = TOKENS.tokens_per_image
MAX_BATCH = 5
CAPTURED = 2 * (4 + 5)  # a vocabulary: windows of one row in 1, 2, 4 and 5 rows, longer ones in 2 to 16
LONG = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3]


needs_gpu = pytest.mark.gpu("_cuda")
on_every_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])


class CountedCudaGraphs(CudaGraphs):
    """CUDA graphs that count as CapturedGraphs do."""

    captured = replayed = 0

    def capture(self, work: Callable[[], R]) -> tuple[Callable[[], None], R]:
        replay, result = super().capture(work)
        self.captured += 1

        def counted() -> None:
            self.replayed += 1
            replay()

        return counted, result


def make_engine(
    runner: GraphRunner | None, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> TokenEngine:
    return TokenEngine(
        CONFIG,
        TOKENS,
        {name: tensor.to(device) for name, tensor in WEIGHTS[dtype].items()},
        max_batch=MAX_BATCH,
        max_prompt_tokens=28,
        page_size=4,
        prefill_chunk=8,
        runner=runner,
    )


def graphed(
    dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[TokenEngine, CapturedGraphs | CountedCudaGraphs]:
    """An engine that has recorded its steps and now runs nothing but replays."""
    graphs = CapturedGraphs() if device == "cpu" else CountedCudaGraphs(torch.device(device))
    engine = make_engine(GraphRunner(graphs), dtype, device)
    engine.capture()
    return engine, graphs


def without_python(engine: TokenEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*_: Any) -> None:
        raise AssertionError("a token ran the decoder's Python")

    monkeypatch.setattr(engine.decoder, "decode", decode)


def submit(
    engine: TokenEngine,
    ids: list[int],
    n: int = 1,
    seed: int = 0,
    draft_window: int | None = 1,
    **changes: Any,
) -> list[Request]:
    """n images of a prompt."""
    samples = [SamplingParams(seed=seed + i, **{"top_k": 20, **changes}) for i in range(n)]
    return [engine.submit(TokenPrompt(ids, sample, draft_window=draft_window)) for sample in samples]


def assert_as_alone(requests: list[Request], dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
    """Each image is what an engine without graphs draws for it alone, bit for bit."""
    engine = make_engine(GraphRunner(None), dtype, device)
    for request in requests:
        (alone,) = engine.generate([dataclasses.replace(request.prompt, draft_window=1)])
        assert request.plan is not None
        assert torch.equal(request.plan.token_ids, alone.token_ids)
        assert torch.equal(request.plan.hidden_states, alone.hidden_states)


@on_every_device
@pytest.mark.parametrize(
    ("dtype", "image_only"), [(torch.float32, True), (torch.float32, False), (torch.bfloat16, True)]
)
def test_members_come_and_go_and_every_token_is_a_replay(
    dtype: torch.dtype, image_only: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, graphs = graphed(dtype, device)
    assert graphs.captured == CAPTURED
    without_python(engine, monkeypatch)
    requests: list[Request] = []
    sizes, steps = [], 0
    for seed in range(7):
        ids, n = LONG[: 2 * seed + 1], 1 + seed % 2
        requests += submit(engine, ids, n, 10 * seed, image_tokens_only=image_only)
        for _ in range(1 + seed % 3):
            sizes.append(len(engine.step()))
            steps += 1
    while engine.busy:
        sizes.append(len(engine.step()))
        steps += 1
    assert set(sizes) == {1, 2, 3, 4, 5}  # 3 is padded
    assert graphs.replayed == steps
    assert graphs.captured == CAPTURED
    assert_as_alone(requests, dtype, device)


@on_every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_pass_of_windows_is_a_replay(
    dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, graphs = graphed(dtype, device)
    without_python(engine, monkeypatch)
    requests: list[Request] = []
    passes = 0
    for seed, window in enumerate((8, 2, None, 3, 16, 1, None)):
        ids, n = LONG[: 2 * seed + 1], 1 + seed % 2
        requests += submit(engine, ids, n, 10 * seed, window, top_k=1 + seed % 3)
        for _ in range(1 + seed % 3):
            engine.step()
            passes += 1
    while engine.busy:
        engine.step()
        passes += 1
    assert graphs.replayed == passes
    assert passes < COUNT * len(requests)
    assert_as_alone(requests, dtype, device)


def test_padding_touches_no_page_and_no_output_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """All memory that is not of the three who run stays as it was, NaN in it included."""
    engine, _ = graphed()
    without_python(engine, monkeypatch)
    cache, results = engine.cache, engine._results
    for memory in (*cache.keys, *cache.values, results.hidden):
        memory.fill_(torch.nan)
    running = submit(engine, LONG, 3)
    engine.step()
    for _ in range(COUNT - 2):
        engine.step()
    owned = {page for image in running for page in image.sequence.page_table}
    slots = [image.slot for image in running]
    others = [page for page in range(cache.num_pages) if page not in owned]
    assert others
    for memory in (*cache.keys, *cache.values):
        assert memory[others].isnan().all()
    unused = [slot for slot in range(MAX_BATCH) if slot not in slots]
    assert results.hidden[unused].isnan().all()
    engine.step()
    assert_as_alone(running)


def test_vocabularies_that_mix_run_without_a_graph_and_the_report_is_told() -> None:
    runner = GraphRunner(CapturedGraphs())
    engine = make_engine(runner)
    engine.capture()
    requests = [
        *submit(engine, LONG[:5], image_tokens_only=True),
        *submit(engine, LONG[:5], image_tokens_only=False),
        *submit(engine, LONG[:7], seed=9),
    ]
    while engine.busy:
        engine.step()
    assert runner.eager == {"tokens of images that draw from different vocabularies"}
    assert_as_alone(requests)


def test_an_engine_that_did_not_prepare_runs_without_graphs_and_the_report_is_told() -> None:
    graphs = CapturedGraphs()
    runner = GraphRunner(graphs)
    engine = make_engine(runner)
    requests = submit(engine, LONG, 3)
    while engine.busy:
        engine.step()
    assert graphs.replayed == graphs.captured == 0
    assert runner.eager == {"tokens of 3 rows"}
    assert_as_alone(requests)


def test_where_no_kernels_are_built_the_definitions_are_recorded() -> None:
    """As on a GPU for which nothing was compiled: the definitions read nothing back either."""
    with ExitStack() as forced:
        for name in ops.all_ops():
            forced.enter_context(ops.force(name, "torch"))
        engine, graphs = graphed()
        requests = submit(engine, LONG, 3)
        while engine.busy:
            engine.step()
        assert graphs.replayed == COUNT
        assert_as_alone(requests)


def test_the_ops_of_replayed_tokens_are_reported() -> None:
    engine, _ = graphed()
    eager = make_engine(None)
    for one in (eager, engine):
        submit(one, LONG)
        while one.busy:
            one.step()
    found = []
    for one in (eager, engine):
        (request,) = submit(one, LONG)
        one.step()
        with ops.recording_usage() as used:
            one.step()
        found.append(used)
        one.cancel(request)
    assert found[0] == found[1]
    assert "sample_tokens" in found[1]


@pytest.mark.parametrize("window", [1, 4])
def test_a_replay_that_is_interrupted_can_be_taken_again(
    window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted: list[list[int]] = []  # counts that can be read again later, as those of a GPU

    def after_a_pass(counts: LateCounts) -> list[int]:
        noted[:] = [counts._counters.tolist()]
        return noted[0]

    monkeypatch.setattr(LateCounts, "after_a_pass", after_a_pass)
    monkeypatch.setattr(LateCounts, "newest", lambda _: noted.pop() if noted else None)
    engine, _ = graphed()
    requests: list[Request] = []
    for length in (5, 10, 3):
        requests += submit(engine, LONG[:length], seed=length, draft_window=window, top_k=2)
    for _ in range(4):
        engine.step()
    replay, calls = captured_graph.Call.replay, 0

    def interrupted(call: captured_graph.Call) -> None:
        nonlocal calls
        calls += 1
        if calls > 12:  # the draws are kept, and the first layer has run
            raise KeyboardInterrupt
        replay(call)

    with monkeypatch.context() as patch:
        patch.setattr(captured_graph.Call, "replay", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    while engine.busy:
        engine.step()
    assert_as_alone(requests)


def test_traffic_through_replays_is_traffic_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stress of the engine, shorter, over graphs: failures, cancellation, features, both vocabularies."""
    runner = GraphRunner(CapturedGraphs())
    engine = test_stress.make_engine(max_batch=7, num_pages=30, runner=runner)
    engine.capture()
    traffic = Traffic(7, engine, [1, None, 2, 5, 16])
    while len(traffic.requests) < 30 or engine.busy:
        if len(traffic.requests) < 30 and len(engine._waiting) < 40:
            for _ in range(traffic.random.choice([0, 0, 1, 1, 2, 5])):
                traffic.submit()
        if traffic.requests and traffic.random.random() < 0.12:
            traffic.cancel()
        engine.step()
        traffic.check_pages()
    found = traffic.check_results()
    assert min(found[kind] for kind in ("finished", "failed", "cancelled")) > 0
