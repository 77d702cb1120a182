"""Ops as contracts: each has a definition in torch, and implementations that are chosen per call.

    @op(tolerance={torch.float32: 1e-6, torch.bfloat16: 1e-6})
    def rms_norm(x, weight, eps): ...                # docstring: the contract; body: the torch reference

    @rms_norm.implementation("cpu", device="cpu", dtypes=FLOATS, available=native.cpu_unavailable)
    def _(x, weight, eps): ...                       # same signature

A call goes to the first implementation, in the order of registration, that is available on this machine and
supports the arguments; the torch reference is the last and takes everything. A choice forced with `force`
or with BLIP3O_OPS="rms_norm=torch,row_linear=cpu" never falls back: it runs or it raises OpError.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Generic, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from blip3o_rt.errors import OpError

P = ParamSpec("P")
R = TypeVar("R")
RangeMaker = Callable[[str], AbstractContextManager[Any]]
Usage = dict[str, set[str]]
"""Names of the implementations that each op ran on; ops that were not called are absent."""

FLOATS = (torch.float32, torch.bfloat16)
"""Dtypes of weights and activations at run time; references also run in float64."""

ENVIRONMENT_VARIABLE = "BLIP3O_OPS"
REFERENCE = "torch"


def usable() -> None:
    """The availability of an implementation that every machine has."""


def always_supported(*_: Any, **__: Any) -> None:
    """The support of an implementation that takes every argument of its device and dtypes."""


def weight_dtype_matches(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> str | None:
    """The support of an implementation whose first two arguments must have one dtype."""
    return None if weight.dtype == x.dtype else "takes x and weight of one dtype"


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    device:    device type of the tensors it takes ("cpu", "cuda"); None for any.
    dtypes:    dtypes of the op's first argument it takes; None for any.
    supports:  called with the call's arguments; None if it can compute them, else the reason in words.
    available: None if it can run on this machine, else the reason and the remedy in words.
    """

    name: str
    run: Callable[..., Any]
    device: str | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    supports: Callable[..., str | None] = always_supported
    available: Callable[[], str | None] = usable

    def takes(self, device: str, dtype: torch.dtype) -> str | None:
        """None if calls with a first argument of this device type and dtype can be taken, else why not."""
        if self.device is not None and device != self.device:
            return f"takes tensors on {self.device}, got {device}"
        if self.dtypes is not None and dtype not in self.dtypes:
            return f"takes {' or '.join(_dtype_name(d) for d in self.dtypes)}, got {_dtype_name(dtype)}"
        return None


@dataclass(frozen=True)
class Choice:
    """One line of the list of implementations that `doctor` prints."""

    op: str
    implementation: str
    chosen: bool  # calls of the device and dtype asked for go here (if their shapes are supported)
    reason: str | None  # why it is not chosen: unavailable (with the remedy), or another one comes first


Candidates = dict[tuple[str, torch.dtype], tuple[Implementation, ...]]


class Op(Generic[P, R]):
    """A named contract, its torch reference, and its implementations; calling it runs one of them.

    tolerance: per dtype of a result, how far any implementation may be from exact, the reference in float64,
    beyond the rounding to that dtype: (|result - exact| - half a unit in the last place) / (|exact| +
    rms(exact)). Arithmetic inside is float32 whatever the dtype, so bfloat16 has float32's tolerance; an op
    whose kernels round in between states a wider one and why.
    """

    def __init__(self, reference: Callable[P, R], tolerance: Mapping[torch.dtype, float]) -> None:
        self.name = cast(Any, reference).__name__
        self.reference = reference
        self.tolerance = dict(tolerance)
        self.__doc__ = reference.__doc__
        self._implementations: tuple[Implementation, ...] = (Implementation(REFERENCE, reference),)
        self._forced: tuple[Implementation, ...] = ()  # by the blocks that are open; the last one counts
        self._candidates: Candidates = {}

    def __repr__(self) -> str:
        return f"<op {self.name}: {', '.join(self.implementation_names)}>"

    @property
    def implementations(self) -> tuple[Implementation, ...]:
        """In order of preference; the torch reference is the last."""
        return self._implementations

    @property
    def implementation_names(self) -> list[str]:
        return [implementation.name for implementation in self._implementations]

    def implementation(
        self,
        name: str,
        *,
        device: str | None = None,
        dtypes: tuple[torch.dtype, ...] | None = None,
        supports: Callable[..., str | None] = always_supported,
        available: Callable[[], str | None] = usable,
    ) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Register the decorated function (same signature as the op) before the torch reference.

        Raises OpError where the op has an implementation of that name.
        """

        def register(run: Callable[P, R]) -> Callable[P, R]:
            if name in self.implementation_names:
                raise OpError(f"op {self.name} has an implementation '{name}' already: choose another name")
            found = Implementation(name, run, device, dtypes, supports, available)
            self._reorder(*self._implementations[:-1], found, self._implementations[-1])
            return run

        return register

    def prefer(self, name: str) -> None:
        """Make an implementation the first that a call tries. Raises OpError for an unknown name."""
        found = self.named(name)
        self._reorder(found, *(other for other in self._implementations if other is not found))

    def withdraw(self, name: str) -> None:
        """Forget an implementation. Raises OpError for an unknown name and for the torch reference."""
        if name == REFERENCE:
            raise OpError(f"op {self.name}: '{REFERENCE}' is its definition and stays")
        found = self.named(name)
        self._reorder(*(other for other in self._implementations if other is not found))

    def _reorder(self, *implementations: Implementation) -> None:
        self._implementations = implementations
        self.choose_again()

    def choose_again(self) -> None:
        """Forget the candidates of calls so far.

        The dictionary is replaced and not cleared: another thread may be storing what it found before.
        """
        self._candidates = {}

    def named(self, name: str) -> Implementation:
        """The implementation of that name. Raises OpError listing the known ones."""
        for implementation in self._implementations:
            if implementation.name == name:
                return implementation
        known = ", ".join(self.implementation_names)
        raise OpError(f"op {self.name} has no implementation '{name}'; it has: {known}")

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        first = cast(Tensor, args[0] if args else next(iter(kwargs.values())))
        key = (first.device.type, first.dtype)
        for implementation in self._candidates.get(key) or self._find_candidates(*key):
            if (reason := implementation.supports(*args, **kwargs)) is None:
                used = _recording.get()
                if used is not None:
                    used.setdefault(self.name, set()).add(implementation.name)
                return cast(R, implementation.run(*args, **kwargs))
        # The torch reference refuses nothing: this one was forced.
        raise self._forced_error(implementation, reason or "it refused the call")

    @property
    def forced(self) -> Implementation | None:
        """The implementation that every call goes to, or None: each call chooses."""
        return self._forced[-1] if self._forced else None

    def force(self, implementation: Implementation | None) -> Implementation | None:
        """Send every call to one implementation (None: choose again); returns what was forced before."""
        previous, self._forced = self.forced, () if implementation is None else (implementation,)
        self.choose_again()
        return previous

    @contextmanager
    def forcing(self, implementation: Implementation) -> Iterator[None]:
        """Within the block, every call of the process runs on this implementation or raises.

        Blocks of several threads may overlap: the last that was opened counts, until it is left.
        """
        block = replace(implementation)  # told from other blocks by its identity
        with _lock:
            self._forced = (*self._forced, block)
            self.choose_again()
        try:
            yield
        finally:
            with _lock:
                self._forced = tuple(other for other in self._forced if other is not block)
                self.choose_again()

    def _find_candidates(self, device: str, dtype: torch.dtype) -> tuple[Implementation, ...]:
        """Available implementations for calls of one kind; remembered, so that a call costs one look-up."""
        read_environment()
        candidates = self._candidates  # before what is forced is read: see choose_again
        forced = self.forced
        if forced is not None:
            reason = forced.available() or forced.takes(device, dtype)
            if reason:
                raise self._forced_error(forced, reason)
            found: tuple[Implementation, ...] = (forced,)
        else:
            found = tuple(i for i in self._implementations if not (i.takes(device, dtype) or i.available()))
        if _make_range is not None:
            found = tuple(self._in_range(implementation, _make_range) for implementation in found)
        candidates[device, dtype] = found
        return found

    def _in_range(self, implementation: Implementation, make_range: RangeMaker) -> Implementation:
        """The implementation, every run of it inside a range named "op [implementation]"."""
        run, name = implementation.run, f"{self.name} [{implementation.name}]"

        def run_in_range(*args: Any, **kwargs: Any) -> Any:
            with make_range(name):
                return run(*args, **kwargs)

        return replace(implementation, run=run_in_range)

    def _forced_error(self, forced: Implementation, reason: str) -> OpError:
        return OpError(
            f"op {self.name} was forced to '{forced.name}', which cannot run here: {reason}. "
            f"Drop the choice ({ENVIRONMENT_VARIABLE} or ops.force) or choose '{REFERENCE}'"
        )

    def choices(self, device: str, dtype: torch.dtype) -> list[Choice]:
        """Every implementation with its standing for calls of this device type and dtype.

        An op that has one dtype only (sampling from float32 logits) is listed for that one.
        """
        read_environment()
        dtype = dtype if dtype in self.tolerance else next(iter(self.tolerance))
        found: list[Choice] = []
        forced = self.forced
        for implementation in self._implementations:
            reason = implementation.takes(device, dtype) or implementation.available()
            if reason is None and forced is not None and implementation.name != forced.name:
                reason = f"'{forced.name}' is forced"
            earlier = next((choice.implementation for choice in found if choice.chosen), None)
            if reason is None and earlier is not None:
                reason = f"'{earlier}' comes first"
            found.append(Choice(self.name, implementation.name, reason is None, reason))
        return found


_ops: dict[str, Op[Any, Any]] = {}
_environment_read = False
_lock = threading.RLock()  # held while what is forced changes
_make_range: RangeMaker | None = None
_recording: ContextVar[Usage | None] = ContextVar("recording", default=None)
_last = threading.local()  # used: of the last recording


def op(tolerance: Mapping[torch.dtype, float]) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Make the decorated torch function an op under its own name: its docstring is the contract."""

    def register(reference: Callable[P, R]) -> Op[P, R]:
        found = Op(reference, tolerance)
        _ops[found.name] = found
        return found

    return register


def all_ops() -> dict[str, Op[Any, Any]]:
    """Every registered op by name."""
    return dict(_ops)


def find(name: str) -> Op[Any, Any]:
    """The op of that name. Raises OpError listing the known ones."""
    if name not in _ops:
        raise OpError(f"there is no op '{name}'; the ops are: {', '.join(sorted(_ops))}")
    return _ops[name]


@contextmanager
def force(op_name: str, implementation_name: str) -> Iterator[None]:
    """Within the block, every call of the op (in the whole process) runs on this implementation or raises.

    Raises OpError for an unknown name, and at the call for an implementation that cannot compute it.
    """
    read_environment()
    target = find(op_name)
    with target.forcing(target.named(implementation_name)):
        yield


def forced() -> dict[str, str]:
    """The implementation that each op is forced to; ops that choose are absent."""
    return {name: implementation.name for name, op in _ops.items() if (implementation := op.forced)}


def read_environment() -> None:
    """Apply BLIP3O_OPS="op=implementation,..." once. Raises OpError for unknown names in it."""
    if not _environment_read:
        with _lock:
            _read_environment()


def _read_environment() -> None:
    global _environment_read
    if _environment_read:
        return
    forced: list[tuple[Op[Any, Any], Implementation]] = []
    for entry in os.environ.get(ENVIRONMENT_VARIABLE, "").split(","):
        if not entry.strip():
            continue
        op_name, equals, implementation_name = (part.strip() for part in entry.partition("="))
        if not equals:
            raise OpError(f"{ENVIRONMENT_VARIABLE}: '{entry.strip()}' is not of the form op=implementation")
        target = find(op_name)
        forced.append((target, target.named(implementation_name)))
    for target, implementation in forced:
        target.force(implementation)
    _environment_read = True


@contextmanager
def recording_usage() -> Iterator[Usage]:
    """Note which implementations the op calls of the block run on: {op: {implementation, ...}}.

    The calls of other threads are not noted, unless they run in a copy of this context, as
    `asyncio.to_thread` makes it. A recording inside another one is added to it at its end.
    """
    outer, used = _recording.get(), Usage()
    token = _recording.set(used)
    try:
        yield used
    finally:
        _recording.reset(token)
        _last.used = used
        if outer is not None:
            note_usage(used)


def note_usage(usage: Mapping[str, set[str]]) -> None:
    """Add to the recording in progress what a replay runs without calling the ops."""
    used = _recording.get()
    if used is not None:
        for name, implementations in usage.items():
            used.setdefault(name, set()).update(implementations)


def used() -> dict[str, tuple[str, ...]]:
    """Deprecated: what the calling thread's last recording noted; use `recording_usage`."""
    warnings.warn("ops.used() is deprecated: use ops.recording_usage()", DeprecationWarning, stacklevel=2)
    noted: Usage = getattr(_last, "used", {})
    return {name: tuple(sorted(implementations)) for name, implementations in sorted(noted.items())}


@contextmanager
def ranges(make_range: RangeMaker) -> Iterator[None]:
    """Within the block, every op call of the process runs inside make_range("op [implementation]")."""
    previous = _make_range
    _set_ranges(make_range)
    try:
        yield
    finally:
        _set_ranges(previous)


def _set_ranges(make_range: RangeMaker | None) -> None:
    """Choose candidates anew, inside ranges or not: a call outside a trace pays nothing for them."""
    global _make_range
    _make_range = make_range
    for found in _ops.values():
        found.choose_again()


def choices(device: str, dtype: torch.dtype) -> list[Choice]:
    """Every implementation of every op with its standing for calls of this device type and dtype."""
    return [choice for name in sorted(_ops) for choice in _ops[name].choices(device, dtype)]


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
