"""Work that is captured once, as a CUDA graph, and replayed; where there are no graphs the work itself runs.

    runner = GraphRunner.of(device)
    step = runner.capture("ar.step x4", work)  # a few runs of work(), then its capture: before ready
    step()                                     # a replay: the same kernels on the same addresses

A caller has one path on every device. What it must keep to is what a graph demands: `work` reads and writes
tensors that stay where they are, reads nothing back, and finds what a replay is to work on in those tensors;
running it a few times before the capture must do no harm. What a replay returns are the tensors of the
capture: the next replay of anything that the runner has captured may overwrite them, because all its graphs
take their memory from one pool. Capture the largest first, so that the smaller ones fit in its memory.

BLIP3O_GRAPHS=off turns graphs off, to measure what they gain or to do without them.
BLIP3O_DEPENDENT_LAUNCHES=on lets a kernel of a token step begin while the one before it ends.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from blip3o_rt import trace
from blip3o_rt.errors import DeviceError, OpError, ParameterError, first_line
from blip3o_rt.isolation import kept
from blip3o_rt.ops import native, registry

R = TypeVar("R")
Shapes = tuple[tuple[int, ...], ...]

ENVIRONMENT_VARIABLE = "BLIP3O_GRAPHS"
DEPENDENT_VARIABLE = "BLIP3O_DEPENDENT_LAUNCHES"
_capturing = threading.Lock()  # torch captures one graph of a device at a time
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


class Captured(Generic[R]):
    """Captured work: a call replays it and returns the tensors that the captured run returned.

    A replay runs the implementations of the capture. A call raises OpError where one of the work's ops is
    forced to another by now.
    """

    def __init__(self, name: str, work: Callable[[], R], graphs: Graphs) -> None:
        self._name = name
        self._range = f"{name} [graph]"
        self._work = work  # holds what the graph's addresses belong to
        try:
            with _capturing, registry.recording_usage() as self._used:
                self._replay, self._result = graphs.capture(work)
        except RuntimeError as error:
            raise DeviceError(
                f"{name} could not be captured as a CUDA graph: {first_line(error)}. "
                f"Run with {ENVIRONMENT_VARIABLE}=off to do without graphs"
            ) from error

    def __call__(self) -> R:
        for op_name, implementation in registry.forced().items():
            captured = self._used.get(op_name, {implementation})
            if captured != {implementation}:
                raise OpError(
                    f"op {op_name} is forced to '{implementation}', and {self._name} was captured with "
                    f"{' and '.join(map(repr, sorted(captured)))}: force it before the pipeline is loaded, "
                    f"or run with {ENVIRONMENT_VARIABLE}=off to do without graphs"
                )
        with trace.span(self._range):
            self._replay()
        registry.note_usage(self._used)
        return self._result


class GraphRunner:
    """Captures work for one device, as graphs of one memory pool; without graphs the work stays as it is."""

    def __init__(self, graphs: Graphs | None) -> None:
        self._graphs = graphs
        self.eager: set[str] = set()  # what ran so although there are graphs

    @classmethod
    def of(cls, device: torch.device) -> GraphRunner:
        """The runner of a device: CUDA graphs on a GPU unless they are turned off, no graphs elsewhere."""
        return cls(CudaGraphs(device) if device.type == "cuda" and graphs_wanted() else None)

    @property
    def captures(self) -> bool:
        """Whether work is replayed, so that every shape it comes in must be captured beforehand."""
        return self._graphs is not None

    def capture(self, name: str, work: Callable[[], R]) -> Callable[[], R]:
        """Capture `work` under the name that traces and errors give it; where nothing is captured, `work`.

        Raises DeviceError where it cannot be captured.
        """
        return work if self._graphs is None else Captured(name, work, self._graphs)

    def note_eager(self, name: str) -> None:
        """Note work that runs eagerly although there are graphs, because its shapes were not captured."""
        self.eager.add(name)

    @contextmanager
    def noting_eager(self) -> Iterator[set[str]]:
        """What is noted within the block."""
        outer, self.eager = self.eager, set()
        try:
            yield self.eager
        finally:
            self.eager = outer


class CapturedFunction(Generic[R]):
    """Calls of `function`: replayed for the shapes that were captured, eager for others.

    The function takes tensors on one device and of one dtype each, and keeps to what a graph demands. Where
    there are graphs, the runner is told of eager calls.
    """

    def __init__(self, name: str, function: Callable[..., R], runner: GraphRunner) -> None:
        self._name = name
        self._function = function
        self._runner = runner
        self._captured: dict[Shapes, tuple[list[Tensor], Callable[[], R]]] = {}

    def capture(self, *examples: Tensor) -> None:
        """Capture calls with arguments like these; without graphs make one, which compiles its kernels."""
        buffers = [torch.zeros_like(example) for example in examples]
        work = self._runner.capture(_described(self._name, buffers), lambda: self._function(*buffers))
        if self._runner.captures:
            self._captured[_shapes(buffers)] = buffers, work
        else:
            work()

    def __call__(self, *arguments: Tensor) -> R:
        """The function's result, which no later call overwrites."""
        with trace.span(self._name):
            captured = self._captured.get(_shapes(arguments))
            if captured is None:
                if self._runner.captures:
                    self._runner.note_eager(_described(self._name, arguments))
                return self._function(*arguments)
            buffers, work = captured
            for buffer, argument in zip(buffers, arguments, strict=True):
                buffer.copy_(argument)
            return tree_map(Tensor.clone, work())


def _shapes(tensors: list[Tensor] | tuple[Tensor, ...]) -> Shapes:
    return tuple(tuple(tensor.shape) for tensor in tensors)


def _described(name: str, tensors: list[Tensor] | tuple[Tensor, ...]) -> str:
    return f"{name} of {', '.join(str(list(tensor.shape)) for tensor in tensors)}"


def graphs_wanted() -> bool:
    """What BLIP3O_GRAPHS says: on (the default) or off. Raises ParameterError for anything else."""
    return _is_on(ENVIRONMENT_VARIABLE, "on")


def _is_on(variable: str, default: str) -> bool:
    value = os.environ.get(variable) or default
    if value not in ("on", "off"):
        raise ParameterError(f"{variable} is {value!r}: accepted are on and off")
    return value == "on"


def dependent_launches(device: torch.device) -> AbstractContextManager[None]:
    """Let a CUDA kernel of ours begin, within the block, while the one before it on the stream ends.

    The first of the block is launched in order. Nothing within the block may write a weight. This does
    nothing on other devices, and unless BLIP3O_DEPENDENT_LAUNCHES=on.

    Raises:
        ParameterError: the variable is neither on nor off.
    """
    module = native.cuda_module() if _is_on(DEPENDENT_VARIABLE, "off") and device.type == "cuda" else None
    return nullcontext() if module is None else kept(module.set_dependent_launches, True, before=False)


class RunAhead:
    """Keeps the host from queueing more than `steps` pieces of work ahead of a GPU.

    A request that is cancelled has to wait for what is queued. On other devices this does nothing.
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
