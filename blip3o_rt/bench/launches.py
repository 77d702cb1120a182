"""How many pieces of work one call sends out: kernels on a GPU, operator calls on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from blip3o_rt.ops import registry

REFERENCE_MARK = f"[{registry.REFERENCE}]"


def kernel_launches(call: Callable[[], Any]) -> int:
    """Kernels, copies and fills that a GPU runs during a call."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        call()
        torch.cuda.synchronize()
    return sum(1 for event in found.events() if event.device_type == DeviceType.CUDA)


def operator_calls(call: Callable[[], Any]) -> int:
    """Calls of torch operators, and of the runtime's native kernels, that Python makes during a call."""
    native = 0

    @contextmanager
    def counted(name: str) -> Iterator[None]:
        nonlocal native
        native += not name.endswith(REFERENCE_MARK)  # a reference is counted by the operators it calls
        yield

    with _OperatorCount() as operators, registry.ranges(counted):
        call()
    return operators.count + native


class _OperatorCount(TorchDispatchMode):
    """Counts every operator that reaches a backend."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))
