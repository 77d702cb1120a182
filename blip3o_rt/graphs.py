"""Work that is captured once, as a CUDA graph, and replayed; where there are no graphs the work itself runs.

    recorder = Recorder.of(device)
    step = recorder.record("ar.step x4", work)  # a few runs of work(), then its capture: before ready
    step()                                      # a replay: the same kernels on the same addresses

A caller has one path on every device. What it must keep to is what a graph demands: `work` reads and writes
tensors that stay where they are, reads nothing back, and finds what a replay is to work on in those tensors;
running it a few times before the capture must do no harm. What a replay returns are the tensors of the
capture: the next replay of anything that the recorder has captured may overwrite them, because all its graphs
take their memory from one pool. Capture the largest first, so that the smaller ones fit in its memory.

BLIP3O_GRAPHS=off turns graphs off, to measure what they gain or to do without them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import torch

from blip3o_rt import trace
from blip3o_rt.errors import DeviceError, OpError, ParameterError
from blip3o_rt.ops import registry

R = TypeVar("R")

ENVIRONMENT_VARIABLE = "BLIP3O_GRAPHS"
WARM_UPS = 2  # runs before a capture: libraries allocate, kernels are loaded and compiled


class Graphs(Protocol):
    """What can capture work: torch's CUDA graphs, or what a test puts in their place."""

    def capture(self, work: Callable[[], R]) -> tuple[Callable[[], None], R]:
        """Run `work` to warm up and capture it; returns the replay and what the captured run returned.

        Raises RuntimeError for work that cannot be captured.
        """


class CudaGraphs:
    """torch.cuda's graphs of one device, in one memory pool."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream()
            self._pool = torch.cuda.graph_pool_handle()

    def capture(self, work: Callable[[], R]) -> tuple[Callable[[], None], R]:
        """See Graphs."""
        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UPS):
                    work()
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # thread_local: what other threads of the program do on the GPU meanwhile is theirs.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                result = work()
        return graph.replay, result


class Recorded(Generic[R]):
    """Captured work: a call replays it and returns the tensors that the captured run returned.

    A replay runs the implementations of the capture. A call raises OpError where one of the work's ops is
    forced to another by now.
    """

    def __init__(self, name: str, work: Callable[[], R], graphs: Graphs) -> None:
        self._name = name
        self._range = f"{name} [graph]"
        self._work = work  # holds what the graph's addresses belong to
        try:
            with registry.recording_usage() as self._used:
                self._replay, self._result = graphs.capture(work)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise DeviceError(
                f"{name} could not be captured as a CUDA graph: {reason}. "
                f"Run with {ENVIRONMENT_VARIABLE}=off to do without graphs"
            ) from error

    def __call__(self) -> R:
        self._check_forced()
        with trace.span(self._range):
            self._replay()
        registry.note_usage(self._used)
        return self._result

    def _check_forced(self) -> None:
        for op_name, implementation in registry.forced().items():
            recorded = self._used.get(op_name, {implementation})
            if recorded != {implementation}:
                raise OpError(
                    f"op {op_name} is forced to '{implementation}', and {self._name} was recorded with "
                    f"{' and '.join(map(repr, sorted(recorded)))}: force it before the pipeline is loaded, "
                    f"or run with {ENVIRONMENT_VARIABLE}=off to do without graphs"
                )


class Recorder:
    """Records work for one device, as graphs of one memory pool; without graphs the work stays as it is.

    `not_recorded` names the work that ran without a graph although there are graphs, for a report: whoever
    finds no recording of the shapes at hand adds to it, and whoever begins a report clears it.
    """

    def __init__(self, graphs: Graphs | None) -> None:
        self._graphs = graphs
        self.not_recorded: set[str] = set()

    @classmethod
    def of(cls, device: torch.device) -> Recorder:
        """The recorder of a device: CUDA graphs on a GPU unless they are turned off, no graphs elsewhere."""
        return cls(CudaGraphs(device) if device.type == "cuda" and graphs_wanted() else None)

    @property
    def captures(self) -> bool:
        """Whether recorded work is replayed, so that every shape it comes in must be recorded beforehand."""
        return self._graphs is not None

    def record(self, name: str, work: Callable[[], R]) -> Callable[[], R]:
        """Capture `work` under the name that traces and errors give it; where nothing is captured, `work`.

        Raises DeviceError where it cannot be captured.
        """
        return work if self._graphs is None else Recorded(name, work, self._graphs)


def graphs_wanted() -> bool:
    """What BLIP3O_GRAPHS says: on (the default) or off. Raises ParameterError for anything else."""
    value = os.environ.get(ENVIRONMENT_VARIABLE) or "on"
    if value not in ("on", "off"):
        raise ParameterError(f"{ENVIRONMENT_VARIABLE} is {value!r}: accepted are on and off")
    return value == "on"


class RunAhead:
    """Keeps the host from queueing more than `steps` pieces of work ahead of a GPU: whoever cancels has to
    wait for what is queued. On other devices it does nothing.
    """

    def __init__(self, device: torch.device, steps: int) -> None:
        self._device, self._window = device, max(1, steps // 2)
        self._queued = 0
        self._previous: torch.cuda.Event | None = None

    def step(self) -> None:
        """Call before each piece of work; waits while too much is queued."""
        if self._device.type != "cuda":
            return
        self._queued += 1
        if self._queued % self._window == 0:
            mark = torch.cuda.Event()
            mark.record(torch.cuda.current_stream(self._device))
            if self._previous is not None:
                self._previous.synchronize()
            self._previous = mark
