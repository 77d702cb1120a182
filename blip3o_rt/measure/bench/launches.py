"""How many pieces of work one call sends out: kernels on a GPU, operator calls on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from blip3o_rt.ops import registry

QUESTIONS = frozenset(  # __get__ is that of a property: shape, dtype, device
    [
        "__get__",
        "__len__",
        "size",
        "dim",
        "ndimension",
        "numel",
        "stride",
        "element_size",
        "data_ptr",
        "is_contiguous",
        "is_floating_point",
        "is_complex",
        "storage_offset",
        "untyped_storage",
        "get_device",
    ]
)
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
    """Calls of torch's functions, and of the runtime's native kernels, that Python makes during a call."""
    native = 0

    @contextmanager
    def counted(name: str) -> Iterator[None]:
        nonlocal native
        native += not name.endswith(REFERENCE_MARK)  # a reference is counted by the operators it calls
        yield

    with _OperatorCount() as operators, registry.ranges(counted):
        call()
    return operators.count + native


class _OperatorCount(TorchFunctionMode):
    """Counts every call of torch, but for questions about a tensor, which move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += getattr(func, "__name__", "") not in QUESTIONS
        return func(*args, **(kwargs or {}))
