"""Graphs for machines without a GPU: the calls that work makes are recorded, and replayed without its Python.

`GraphRunner(CapturedGraphs())` puts them in place of CUDA graphs, and they are as strict: a capture fails on
whatever reads back from the device or takes numbers from the host; a replay makes the recorded calls on the
recorded addresses, and fails where memory that the graph did not allocate itself is gone by then. Whatever
captures allocated is lost at the next replay of any of these graphs, as it may be in one memory pool: it is
filled with NaN (-1 where it is read as integers).

Every capture is checked: on the same memory a replay leaves the bits that the work itself leaves, and so does
another one, behind a replay of the graph before it. That catches work whose launches depend on Python's
state, and what a replay leaves behind for the next one.

What is recorded is PyTorch's operators and, as one call each, what native and other kernels of ours compute.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from blip3o_rt.dit import workspace
from blip3o_rt.graphs import WARM_UPS
from blip3o_rt.ops.registry import REFERENCE, Implementation, Op

R = TypeVar("R")

READS_BACK = {
    *("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "bincount"),
    *("repeat_interleave", "unique_dim", "unique_consecutive", "_unique2"),
}
FROM_THE_HOST = {"lift_fresh", "lift_fresh_copy"}  # torch.tensor(numbers) and the like
ALLOCATES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}  # launches nothing
HOST_METHODS = (Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__, torch.from_numpy)


@dataclass(frozen=True)
class Address:
    """A tensor by where it lies: it keeps no memory alive."""

    storage: StorageWeakRef
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: Tensor) -> Address:
        storage = StorageWeakRef(tensor.untyped_storage())
        return cls(storage, tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset())

    def tensor(self) -> Tensor:
        """The tensor that lies there now."""
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)  # type: ignore[attr-defined]
        assert storage is not None, f"memory of {list(self.size)} {self.dtype} that a graph uses is gone"
        return torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.size, self.stride)


@dataclass(frozen=True)
class Call:
    """One call: what it runs, on which addresses, and where its new results lie."""

    run: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: list[Address | None]  # None: written in place, by the call itself

    def replay(self) -> None:
        def here(value: Any) -> Any:
            return value.tensor() if isinstance(value, Address) else value

        found = self.run(*tree_map(here, self.args), **tree_map(here, self.kwargs))
        for new, place in zip(tree_leaves(found), self.results, strict=True):
            if place is not None:
                place.tensor().copy_(new)


class CapturedGraphs:
    """See the head of the file; `captured` and `replayed` count, for tests that ask how often."""

    def __init__(self) -> None:
        self.captured = 0
        self.replayed = 0
        self._last: _Capture | None = None
        self._written: list[_Capture] = []  # whose memory holds numbers since it was last filled

    def capture(self, work: Callable[[], R]) -> tuple[Callable[[], None], R]:
        for _ in range(WARM_UPS):
            work()
        capture = _Capture()
        with capture.recording():
            result = work()
        self._written.append(capture)
        self._check(work, capture, result)
        self._last = capture
        self.captured += 1

        def replay() -> None:
            self.replayed += 1
            self._replay(capture)

        return replay, result

    def _replay(self, capture: _Capture) -> None:
        for written in self._written:
            written.forget()
        self._written = [capture]
        for call in capture.calls:
            call.replay()

    def _check(self, work: Callable[[], Any], capture: _Capture, result: Any) -> None:
        """Fail where replays of a capture and its work leave different bits."""
        before = self._last if self._last is not None and self._last.is_alive() else None
        used = capture.used()
        memory = {**used, **(before.used() if before is not None else {})}
        begin = {place: bytes_of(storage).clone() for place, storage in memory.items()}

        def outcome(run: Callable[[], Any]) -> list[Tensor]:
            found = run()
            left = [bytes_of(used[place]).clone() for place in sorted(used)]
            for place, storage in memory.items():
                bytes_of(storage).copy_(begin[place])
            return left + [_bits(tensor) for tensor in tree_leaves(found) if isinstance(tensor, Tensor)]

        def replay() -> Any:
            self._replay(capture)
            return result

        runs = {"the work": outcome(work), "a replay": outcome(replay)}
        if before is not None:
            outcome(lambda: self._replay(before))
        runs["another replay"] = outcome(replay)
        for name, left in runs.items():
            same = all(torch.equal(a, b) for a, b in zip(left, runs["a replay"], strict=True))
            assert same, f"{name} and a replay leave different bits"


class _Capture(TorchDispatchMode):
    """Records the calls made within `recording`."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.places: dict[int, Address] = {}  # one in each piece of memory that the calls touch
        self.allocated: dict[int, torch.UntypedStorage] = {}
        self._inside_kernel = False

    @contextmanager
    def recording(self) -> Iterator[None]:
        """What the block calls is recorded."""
        for_op = Op._find_candidates

        def recorded_candidates(op: Op[Any, Any], device: torch.device, dtype: torch.dtype) -> Any:
            found = tuple(self._recorded(implementation) for implementation in for_op(op, device, dtype))
            op._candidates[device, dtype] = found
            return found

        _forget_candidates()
        try:
            with (
                mock.patch.object(Op, "_find_candidates", recorded_candidates),
                mock.patch.object(workspace, "_large_pages", torch.empty),  # as on a GPU
                _NoHostMethods(),
                self,
            ):
                yield
        finally:
            _forget_candidates()

    def used(self) -> dict[int, torch.UntypedStorage]:
        """The memory that the calls touch, without what the capture allocated, which is lost anyway."""
        return {
            place: address.tensor().untyped_storage()
            for place, address in self.places.items()
            if place not in self.allocated
        }

    def is_alive(self) -> bool:
        """Whether nobody has let go of memory that the calls touch."""
        return not any(address.storage.expired() for address in self.places.values())

    def forget(self) -> None:
        """Fill all that the capture allocated."""
        for storage in self.allocated.values():
            bytes_of(storage).fill_(0xFF)

    def _recorded(self, implementation: Implementation) -> Implementation:
        """The implementation, its runs recorded; a torch reference is recorded by the operators it calls."""

        def run(bound: Any) -> Any:
            if self._inside_kernel:  # one of the ops that a recorded call is composed of
                return implementation.run(bound)
            self._inside_kernel = True
            try:
                result = implementation.run(bound)
            finally:
                self._inside_kernel = False
            self._note(implementation.run, (bound,), {}, result)
            return result

        return (
            implementation
            if implementation.name == REFERENCE
            else dataclasses.replace(implementation, run=run)
        )

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._inside_kernel:
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name in READS_BACK or (name.startswith("index") and _has_mask(args)):
            raise RuntimeError(f"operation not permitted when stream is capturing: {name} reads back")
        if name in FROM_THE_HOST:
            raise RuntimeError("operation not permitted when stream is capturing: a copy from the host")
        result = func(*args, **kwargs)
        if func.is_view:
            return result
        if name in ALLOCATES:
            self._keep(result)
        else:
            self._note(func, args, kwargs, result)
        return result

    def _note(self, run: Callable[..., Any], args: Any, kwargs: dict[str, Any], result: Any) -> None:
        given = {_storage(value) for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
        new = [tensor if _storage(tensor) not in given else None for tensor in tree_leaves(result)]
        for tensor in new:
            if tensor is not None:
                self._keep(tensor)

        def address(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            found = Address.of(value)
            self.places.setdefault(found.storage.cdata, found)
            return found

        self.calls.append(
            Call(run, tree_map(address, args), tree_map(address, kwargs), tree_map(address, new))
        )

    def _keep(self, tensor: Tensor) -> None:
        self.allocated[_storage(tensor)] = tensor.untyped_storage()


class _NoHostMethods(TorchFunctionMode):
    """Refuses the methods that take a tensor to the host without an operator that could be recorded."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        moves = func is Tensor.to and any(
            isinstance(value, str | torch.device) for value in (*args, *kwargs.values())
        )
        if func in HOST_METHODS or moves:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func.__name__}")
        return func(*args, **kwargs)


def _forget_candidates() -> None:
    from blip3o_rt import ops

    for op in ops.all_ops().values():
        op.choose_again()


def bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8).clone()


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _has_mask(args: tuple[Any, ...]) -> bool:
    """Whether an index is a mask, whose number of elements the host would have to know."""
    indices = tree_leaves(args[1:2])
    return any(isinstance(index, Tensor) and index.dtype == torch.bool for index in indices)
