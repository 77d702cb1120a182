"""Recorded work: replays make the same calls on the same memory, and what a graph cannot hold is refused."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from blip3o_rt import ops, trace
from blip3o_rt.errors import DeviceError, OpError, ParameterError
from blip3o_rt.graphs import (
    CudaGraphs,
    GraphRunner,
    Graphs,
    RunAhead,
    dependent_launches,
    graphs_wanted,
)
from blip3o_rt.ops import native
from tests.captured_graph import CapturedGraphs

needs_gpu = pytest.mark.gpu


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def graphs(device: torch.device) -> Graphs:
    return CapturedGraphs() if device.type == "cpu" else CudaGraphs(device)


def test_without_graphs_recorded_work_is_the_work() -> None:
    runner = GraphRunner.of(torch.device("cpu"))

    def work() -> int:
        return 3

    assert not runner.captures
    assert runner.capture("work", work) is work


def test_a_replay_runs_no_python_and_sees_what_its_memory_holds(graphs: Graphs, device: torch.device) -> None:
    x, weight = torch.ones(3, 8, device=device), torch.ones(8, device=device)
    total = torch.zeros(3, 8, device=device)
    runs = 0

    def work() -> Tensor:
        nonlocal runs
        runs += 1
        normed = ops.rms_norm(x, weight, 0.0)  # native where it can be
        doubled = torch.cat([normed, normed]).view(2, 3, 8).sum(0)  # views and new memory
        total.add_(doubled)
        return doubled + torch.arange(8, device=device)

    replay = GraphRunner(graphs).capture("work", work)
    runs = 0
    total.zero_()
    expected = torch.zeros_like(total)
    for seed in range(3):
        x.copy_(torch.randn(3, 8, generator=torch.Generator().manual_seed(seed)))
        doubled = 2 * ops.rms_norm(x, weight, 0.0)
        expected += doubled
        assert torch.equal(replay(), doubled + torch.arange(8, device=device))
    assert torch.equal(total, expected)
    assert runs == 0


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x.sum().item(),
        lambda x: x if x.sum() > 0 else -x,
        lambda x: int(x[0]),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: x + torch.tensor([1.0, 2.0, 3.0]).to(x),
        lambda x: torch.equal(x, x),
    ],
)
def test_what_a_graph_cannot_hold_is_refused_in_one_line(
    work: Callable[[Tensor], Any],
) -> None:
    x = torch.ones(3)
    with pytest.raises(DeviceError, match=r"^the work could not be captured .* BLIP3O_GRAPHS=off") as error:
        GraphRunner(CapturedGraphs()).capture("the work", lambda: work(x))
    assert "\n" not in str(error.value)


def test_the_results_of_a_replay_last_until_the_next_of_any_graph() -> None:
    runner = GraphRunner(CapturedGraphs())
    first = runner.capture("first", lambda: torch.zeros(3) + 1)
    second = runner.capture("second", lambda: torch.zeros(2) + 2)
    one = first()
    assert one.tolist() == [1, 1, 1]
    two = second()
    assert two.tolist() == [2, 2]
    assert one.isnan().all()


def test_memory_that_a_graph_uses_and_nobody_keeps_is_missed() -> None:
    held = [torch.ones(3)]
    replay = GraphRunner(CapturedGraphs()).capture("work", lambda: held[0] + 1)
    assert replay().tolist() == [2, 2, 2]
    held[0] = torch.zeros(3)
    with pytest.raises(AssertionError, match=r"memory of \[3\] torch.float32 that a graph uses is gone"):
        replay()


def test_a_replay_notes_the_ops_of_its_capture() -> None:
    x = torch.ones(2, 8)
    replay = GraphRunner(CapturedGraphs()).capture("work", lambda: ops.rms_norm(x, x[0], 0.0))
    with ops.recording_usage() as used:
        ops.silu_mul(x)
        assert list(used) == ["silu_mul"]
        replay()
    assert list(used) == ["silu_mul", "rms_norm"]
    with ops.recording_usage() as used:
        replay()
    assert list(used) == ["rms_norm"]


def test_a_forced_implementation_is_what_is_captured() -> None:
    x = torch.ones(2, 8)
    with ops.force("rms_norm", "torch"):
        replay = GraphRunner(CapturedGraphs()).capture("work", lambda: ops.rms_norm(x, x[0], 0.0))
    x.copy_(torch.arange(16.0).view(2, 8))
    with ops.recording_usage() as used:
        assert torch.equal(replay(), ops.rms_norm.reference(x, x[0], 0.0))
    assert used == {"rms_norm": {"torch"}}


def test_what_is_forced_later_is_refused_and_not_ignored() -> None:
    x = torch.ones(2, 8)
    with ops.force("rms_norm", "torch"):
        replay = GraphRunner(CapturedGraphs()).capture("the step", lambda: ops.rms_norm(x, x[0], 0.0))
        replay()
    replay()  # nothing is forced, and the recording is as good as any
    with (
        ops.recording_usage() as used,
        ops.force("silu_mul", "torch"),
        ops.force("rms_norm", "cpu"),
        pytest.raises(OpError) as error,
    ):
        replay()
    assert str(error.value) == (
        "op rms_norm is forced to 'cpu', and the step was captured with 'torch': force it before the "
        "pipeline is loaded, or run with BLIP3O_GRAPHS=off to do without graphs"
    )
    assert used == {}
    with ops.force("silu_mul", "torch"), ops.force("rms_norm", "torch"):
        replay()


def test_a_replay_is_one_range_of_a_trace() -> None:
    seen: list[str] = []

    def make_range(name: str) -> AbstractContextManager[None]:
        seen.append(name)
        return nullcontext()

    x = torch.ones(2, 8)
    replay = GraphRunner(CapturedGraphs()).capture("step", lambda: ops.rms_norm(x, x[0], 0.0))
    with trace.ranges(make_range):
        replay()
    assert seen == ["step [graph]"]


def test_a_replay_that_leaves_other_bits_than_the_work_is_refused() -> None:
    """Its launches depend on what Python counts, so the capture holds what only one run did."""
    total, runs = torch.zeros(3), 0

    def work() -> Tensor:
        nonlocal runs
        runs += 1
        return total.add_(runs)

    with pytest.raises(AssertionError, match="the work and a replay leave different bits"):
        GraphRunner(CapturedGraphs()).capture("work", work)


def test_a_replay_that_depends_on_the_graph_before_it_is_refused() -> None:
    """A kernel returns the rows of the call before, which it keeps where no argument shows it."""
    rms_norm, rows = ops.all_ops()["rms_norm"], [0]

    def forgetful(x: Tensor, *_: Any, **__: Any) -> Tensor:
        before, rows[0] = rows[0], len(x)
        return torch.full_like(x, float(before))

    rms_norm.implementation("forgetful")(forgetful)
    runner, weight = GraphRunner(CapturedGraphs()), torch.ones(8)
    three, two = torch.ones(3, 8), torch.ones(2, 8)
    try:
        with ops.force("rms_norm", "forgetful"):
            runner.capture("three rows", lambda: ops.rms_norm(three, weight, 0.0))
            with pytest.raises(AssertionError, match="another replay and a replay leave different bits"):
                runner.capture("two rows", lambda: ops.rms_norm(two, weight, 0.0))
    finally:
        rms_norm.withdraw("forgetful")


def test_the_environment_turns_graphs_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert graphs_wanted()
    monkeypatch.setenv("BLIP3O_GRAPHS", "off")
    assert not graphs_wanted()
    monkeypatch.setenv("BLIP3O_GRAPHS", "maybe")
    with pytest.raises(ParameterError, match="BLIP3O_GRAPHS is 'maybe': accepted are on and off"):
        graphs_wanted()


def test_the_environment_turns_dependent_launches_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the block, also where it fails; and for CUDA devices alone."""
    seen: list[bool] = []
    module = SimpleNamespace(set_dependent_launches=seen.append)
    monkeypatch.setattr(native, "cuda_module", lambda: module)
    cuda = torch.device("cuda")
    with dependent_launches(cuda):
        assert not seen
    monkeypatch.setenv("BLIP3O_DEPENDENT_LAUNCHES", "on")
    with dependent_launches(torch.device("cpu")):
        assert not seen
    with pytest.raises(RuntimeError, match="it failed"), dependent_launches(cuda):
        raise RuntimeError("it failed")
    assert seen == [True, False]
    monkeypatch.setenv("BLIP3O_DEPENDENT_LAUNCHES", "1")
    message = "BLIP3O_DEPENDENT_LAUNCHES is '1': accepted are on and off"
    with pytest.raises(ParameterError, match=message), dependent_launches(cuda):
        pass


@pytest.mark.parametrize("steps", [1, 2, 5, 16])
def test_the_host_queues_no_more_than_it_may(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that does nothing until it is waited for."""
    queued = done = 0

    class Event:
        def record(self, _: object) -> None:
            self.after = queued

        def synchronize(self) -> None:
            nonlocal done
            done = max(done, self.after)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    ahead = RunAhead(torch.device("cuda"), steps)
    most = 0
    for _ in range(100):
        ahead.step()
        queued += 1
        most = max(most, queued - done)
    assert steps / 2 <= most <= max(steps, 2)
