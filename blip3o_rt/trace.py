"""Named ranges of a request's stages, steps and ops, and the trace of one request as a file.

Where no trace is being taken a range of a stage or a step costs one comparison, and an op's costs nothing:
the ops' ranges are put around their implementations when a trace begins, and taken away when it ends.

    trace.recorded(path, device)    Chrome trace JSON for ui.perfetto.dev or chrome://tracing
    trace.nvtx()                    the same ranges as NVTX, for a profiler that runs the program
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blip3o_rt import __version__
from blip3o_rt.errors import DeviceError, ParameterError
from blip3o_rt.files import replacing

if TYPE_CHECKING:
    import torch
    from torch.profiler import ProfilerActivity, profile

RangeMaker = Callable[[str], AbstractContextManager[Any]]
SUFFIXES = (".json", ".json.gz")
DEFAULT_TOKENS = 64
TOKEN = "ar.token "
OP_MARK = " ["

_make_range: RangeMaker | None = None
_NO_RANGE: AbstractContextManager[Any] = nullcontext()


def span(name: str, index: int | None = None) -> AbstractContextManager[Any]:
    """The range of a block: a stage, or one of its steps by number; nothing where no trace is taken."""
    if _make_range is None:
        return _NO_RANGE
    return _make_range(name if index is None else f"{name} {index}")


@contextmanager
def spanned(name: str) -> Iterator[None]:
    """The same around every call of the decorated function."""
    with span(name):
        yield


@contextmanager
def ranges(make_range: RangeMaker) -> Iterator[None]:
    """Within the block every stage, step and op of this process runs inside make_range(its name).

    An op's name is "op [implementation]".
    """
    from blip3o_rt.ops import registry

    global _make_range
    previous, _make_range = _make_range, make_range
    try:
        with registry.ranges(make_range):
            yield
    finally:
        _make_range = previous


def check_path(path: Path) -> None:
    """Raise ParameterError unless the name is one of a trace file."""
    if not path.name.endswith(SUFFIXES):
        raise ParameterError(f"a trace goes to a file ending in {' or '.join(SUFFIXES)}, not {path}")


class Recording:
    """Makes the ranges of a trace, and stops collecting after the first tokens of a long plan.

    A token takes hundreds of operations: all of a published image's would be more than a viewer opens.
    """

    def __init__(self, profiler: profile, activities: list[ProfilerActivity], tokens: int | None) -> None:
        self._profiler, self._activities, self._tokens = profiler, activities, tokens
        self._collecting = True

    def make_range(self, name: str) -> AbstractContextManager[Any]:
        """The range of a stage, step or op; nothing while not collecting."""
        from torch.profiler import record_function

        is_token = name.startswith(TOKEN)
        if is_token and self._tokens is not None and int(name.removeprefix(TOKEN)) >= self._tokens:
            self._collect(False)
        elif not is_token and OP_MARK not in name:
            self._collect(True)
        return record_function(name) if self._collecting else _NO_RANGE

    def _collect(self, collecting: bool) -> None:
        if collecting != self._collecting:
            self._profiler.toggle_collection_dynamic(collecting, self._activities)
            self._collecting = collecting


@contextmanager
def recorded(
    path: str | Path, device: torch.device | None = None, tokens: int | None = DEFAULT_TOKENS
) -> Iterator[None]:
    """Trace the block into a file: all ranges, PyTorch's own operations, and on a GPU its kernels.

    path: a .json, or a .json.gz, about a tenth as large. tokens: how many of a plan's tokens to record, from
    the first one on; None is all. The file is written beside its target and renamed once the block has ended;
    a block that raises leaves none. Raises ParameterError for another name.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    target = Path(path)
    check_path(target)
    on_gpu = device is not None and device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, acc_events=False) as profiler:
        profiler.add_metadata("blip3o_rt", __version__)
        with ranges(Recording(profiler, activities, tokens).make_range):
            yield
        if on_gpu:
            torch.cuda.synchronize(device)
    with replacing(target) as temporary:
        profiler.export_chrome_trace(os.fspath(temporary))


@contextmanager
def nvtx() -> Iterator[None]:
    """Give all ranges to NVTX, for Nsight Systems or Nsight Compute. Raises DeviceError without a GPU."""
    import torch

    from blip3o_rt.machine import cuda_status

    reason = cuda_status()
    if reason is not None:
        raise DeviceError(f"NVTX ranges need a GPU: {reason}")
    with ranges(torch.cuda.nvtx.range):
        yield
