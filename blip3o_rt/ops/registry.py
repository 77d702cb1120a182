"""Ops as contracts: each has a definition in torch, and implementations that are chosen per call.

    @op("x [..., D], weight [D], bias [D], residual [..., D] -> [..., D]", tolerance={...})
    def rms_norm(x, weight, eps, *, bias=None, residual=None, out=None): ...  # contract and definition

    rms_norm.native("cuda", dtypes=FLOATS, supports=same_dtype("x", "weight"))  # the kernel of that name
    rms_norm.native("cpu", dtypes=FLOATS, supports=same_dtype("x", "weight"))

    @rms_norm.implementation("mine", device="cpu", dtypes=FLOATS)  # any other function, same signature
    def _(x, weight, eps, *, bias=None, residual=None, out=None): ...

A call goes to the first implementation, in the order of registration, that is available on this machine and
supports the arguments; the torch reference is the last and takes everything. A choice forced with `force`
or with BLIP3O_OPS="rms_norm=torch,row_linear=cpu" never falls back: it runs or it raises OpError. A tensor
of a wrong shape is the same error whatever would have run; shapes.py has the notation.
"""

from __future__ import annotations

import functools
import inspect
import os
import threading
import warnings
from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, Generic, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from blip3o_rt.errors import OpError
from blip3o_rt.ops import native, triton_backend
from blip3o_rt.ops.dtypes import FLOATS, name_of
from blip3o_rt.ops.scratch import Scratch
from blip3o_rt.ops.shapes import Shapes

P = ParamSpec("P")
R = TypeVar("R")
Supports = Callable[[Any], str | None]
RangeMaker = Callable[[str], AbstractContextManager[Any]]

ENVIRONMENT_VARIABLE = "BLIP3O_OPS"
REFERENCE = "torch"


def usable() -> None:
    """Default for `available`: always."""


def same_dtype(*names: str) -> Supports:
    """Support for calls whose arguments of these names, as far as they are given, have one dtype."""
    first, *others = names
    reason = f"takes {', '.join(names[:-1])} and {names[-1]} of one dtype"
    same = [f"(call.{name} is None or call.{name}.dtype is call.{first}.dtype)" for name in others]
    compiled: Supports = eval(f"lambda call: None if {' and '.join(same)} else {reason!r}")
    return compiled  # a loop over the names takes three times as long


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    Attributes:
        run: Computes a bound call, which has the op's arguments as attributes (call.x, call.out).
        device: Device type of the tensors it takes ("cpu", "cuda"); None for any.
        dtypes: Dtypes of the op's first argument it takes; None for any.
        supports: Given the bound call, None if it can compute it, else the reason; None for every call.
        available: None if it can run on this machine, else the reason and the remedy.
        weights: Dtypes of the argument `weight` that it takes beside each dtype of the first; None for any.
        needs: Further availability check per dtype of the first argument.
        batch_invariant: A row's result is bit-identical whatever other rows are in the call.
        on_request: It runs only where it is forced.
    """

    name: str
    run: Callable[[Any], Any]
    device: str | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    supports: Supports | None = None
    available: Callable[[], str | None] = usable
    weights: Mapping[torch.dtype, tuple[torch.dtype, ...]] | None = None
    needs: Mapping[torch.dtype, Callable[[], str | None]] = field(default_factory=dict)
    batch_invariant: bool = False
    on_request: bool = False

    def takes(self, device: str, dtype: torch.dtype, weight: torch.dtype | None = None) -> str | None:
        """None if calls with a first argument of this device type and dtype can be taken, else why not.

        Args:
            weight: The dtype of the argument `weight`; None for any.
        """
        if self.device is not None and device != self.device:
            return f"takes tensors on {self.device}, got {device}"
        if self.dtypes is not None and dtype not in self.dtypes:
            return f"takes {' or '.join(map(name_of, self.dtypes))}, got {name_of(dtype)}"
        taken = (weight,) if self.weights is None else self.weights[dtype]
        if weight is not None and weight not in taken:
            accepted = " or ".join(name_of(one) for one in taken if one is not None)
            return f"takes a weight of {accepted}, got {name_of(weight)}"
        return self.needs.get(dtype, usable)()

    def refusal(self, call: Any) -> str | None:
        """Why it cannot compute a call of its device and dtypes, or None."""
        return None if self.supports is None else self.supports(call)


@dataclass(frozen=True)
class Choice:
    """One line of the list of implementations that `doctor` prints."""

    op: str
    implementation: str
    chosen: bool  # calls of the device and dtype asked for go here (if their shapes are supported)
    reason: str | None  # why it is not chosen: unavailable (with the remedy), or another one comes first


class Usage(dict[str, set[str]]):
    """Names of the implementations that each op ran on; ops that were not called are absent."""

    def __missing__(self, op_name: str) -> set[str]:
        return self.setdefault(op_name, set())


Candidates = dict[tuple[torch.device, torch.dtype], tuple[Implementation, ...]]


class Op(Generic[P, R]):
    """A named contract, its torch reference, and its implementations; calling it runs one of them.

    tolerance: per dtype of a result, how far any implementation may be from exact, the reference in float64,
    beyond the rounding to that dtype: (|result - exact| - half a unit in the last place) / (|exact| +
    rms(exact)). Arithmetic inside is float32 whatever the dtype, so bfloat16 has float32's tolerance; an op
    whose kernels round in between states a wider one and why.
    """

    def __init__(
        self,
        reference: Callable[P, R],
        shapes: str,
        tolerance: float | Mapping[torch.dtype, float],
        out_dtype: str | torch.dtype | None,
    ) -> None:
        self.name = cast(Any, reference).__name__
        self.reference = reference
        self.tolerance = dict(
            tolerance if isinstance(tolerance, Mapping) else dict.fromkeys(FLOATS, tolerance)
        )
        self.__doc__ = reference.__doc__
        parameters = list(inspect.signature(reference).parameters.values())
        self.argument_names = [parameter.name for parameter in parameters]
        self.shapes = Shapes.of(shapes, self.argument_names)
        # Compiled, because every call passes here: function(call[0], call[1], out=call[2]).
        passed = [
            f"{p.name}=call[{i}]" if p.kind is p.KEYWORD_ONLY else f"call[{i}]"
            for i, p in enumerate(parameters)
        ]
        self._apply = eval(f"lambda function, call: function({', '.join(passed)})")
        defaults = [p.default for p in parameters if p.default is not p.empty]
        # Binding a call to names costs less than passing *args and **kwargs on.
        bound = cast(Any, namedtuple)(self.name, self.argument_names, defaults=defaults)
        self.bind: Callable[..., Any] = functools.partial(bound.__new__, bound)  # half the time of bound()
        self._out_dtype = out_dtype
        self._result_like = self._index(self.shapes.like())
        self._out = self._index("out")
        self._result = self._index(self.shapes.returned or "out")
        self.implementations: tuple[Implementation, ...] = (
            Implementation(REFERENCE, self._checked(reference)),
        )  # in order of preference; the torch reference is the last
        self._forced: tuple[Implementation, ...] = ()  # by the blocks that are open; the last one counts
        self._candidates: Candidates = {}

    def __repr__(self) -> str:
        return f"<op {self.name}: {', '.join(self.implementation_names)}>"

    def _index(self, name: str | None) -> int | None:
        return self.argument_names.index(name) if name in self.argument_names else None

    @property
    def implementation_names(self) -> list[str]:
        return [implementation.name for implementation in self.implementations]

    def implementation(
        self,
        name: str,
        *,
        device: str | None = None,
        dtypes: tuple[torch.dtype, ...] | None = None,
        supports: Callable[..., str | None] | None = None,
        available: Callable[[], str | None] = usable,
        **others: Any,
    ) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Register the decorated function (same signature as the op) before the torch reference.

        Args:
            others: As in Implementation.
            supports: Given the bound call, which has the op's arguments as attributes: None, or why the
                function cannot compute it. One with the op's signature is taken as well, and deprecated.

        Raises:
            OpError: The op has an implementation of that name.
        """
        if supports is not None and len(inspect.signature(supports).parameters) != 1:
            warnings.warn(
                f"op {self.name}: `supports` of '{name}' takes the op's arguments, which is deprecated: "
                f"let it take one bound call (call.{self.argument_names[0]})",
                DeprecationWarning,
                stacklevel=2,
            )
            supports = functools.partial(self._apply, supports)

        def register(function: Callable[P, R]) -> Callable[P, R]:
            run = self._checked(function)
            self._add(Implementation(name, run, device, dtypes, supports, available, **others))
            return function

        return register

    def composed(
        self, *, dtypes: tuple[torch.dtype, ...], supports: Supports | None = None
    ) -> Callable[[Callable[[Any], R]], None]:
        """Register the decorated function of a bound call, which calls other ops; these check the shapes."""
        return lambda function: self._add(
            Implementation("composed", function, dtypes=dtypes, supports=supports)
        )

    def native(
        self,
        device: str,
        *,
        dtypes: tuple[torch.dtype, ...],
        scratch: Callable[[Scratch, Any], Any] | None = None,
        **options: Any,
    ) -> None:
        """Register the compiled kernel of the op's name, of blip3o_rt._cpu or blip3o_rt._cuda.

        Its signature is the op's. It checks the shapes itself, so that a call pays for that once.

        Args:
            scratch: Given the call's scratch memory and the call, what the kernel takes in its place.
            options: As in Implementation.
        """

        def run(call: Any) -> Any:
            call = self.with_out(call)
            if scratch is not None:
                call = call._replace(scratch=scratch(call.scratch or Scratch(), call))
            kernel = getattr(getattr(native, device)(), self.name)
            self._apply(kernel, call)
            return call[self._result]

        options.setdefault("available", getattr(native, f"{device}_unavailable"))
        self._add(Implementation(device, run, device, dtypes=dtypes, **options))

    def triton(self, *, dtypes: tuple[torch.dtype, ...], supports: Supports, **options: Any) -> None:
        """Register the launcher of the op's name in blip3o_rt.triton_kernels; its arguments are the op's.

        options: As in Implementation.
        """

        def run(call: Any) -> Any:
            call = self.with_out(call)
            launch = triton_backend.kernel(self.name)
            launch(*(getattr(call, name) for name in inspect.signature(launch).parameters))
            return call[self._result]

        def refusal(call: Any) -> str | None:
            self.shapes.check(self.name, call)  # before a kernel leaves the memory of a tensor
            return supports(call)

        options.setdefault("available", triton_backend.unavailable)
        self._add(Implementation("triton", run, "cuda", dtypes=dtypes, supports=refusal, **options))

    def with_out(self, call: Any) -> Any:
        """The call, with memory for its result where it brings none."""
        if self._out is None or call[self._out] is not None:
            return call
        out = self._out
        return tuple.__new__(type(call), (*call[:out], self.new_result(call), *call[out + 1 :]))

    def new_result(self, call: Any) -> Tensor:
        """Memory for a call's result, on the device of the first argument."""
        dtype = getattr(call, self._out_dtype) if isinstance(self._out_dtype, str) else self._out_dtype
        if self._result_like is not None:
            return torch.empty_like(
                call[self._result_like], dtype=dtype, memory_format=torch.contiguous_format
            )
        return cast(Tensor, call[0].new_empty(self.shapes.result_shape(call), dtype=dtype))

    def _checked(self, function: Callable[P, R]) -> Callable[[Any], R]:
        """The same for a function that relies on the shapes of the contract."""

        def run_checked(call: Any) -> R:
            self.shapes.check(self.name, call)
            return cast(R, self._apply(function, call))

        return run_checked

    def _add(self, found: Implementation) -> None:
        if found.name in self.implementation_names:
            raise OpError(f"op {self.name} has an implementation '{found.name}' already: choose another name")
        self._reorder(*self.implementations[:-1], found, self.implementations[-1])

    def prefer(self, name: str) -> None:
        """Make an implementation the first that a call tries. Raises OpError for an unknown name."""
        found = self.named(name)
        self._reorder(found, *(other for other in self.implementations if other is not found))

    def withdraw(self, name: str) -> None:
        """Forget an implementation. Raises OpError for an unknown name and for the torch reference."""
        if name == REFERENCE:
            raise OpError(f"op {self.name}: '{REFERENCE}' is its definition and stays")
        found = self.named(name)
        self._reorder(*(other for other in self.implementations if other is not found))

    def _reorder(self, *implementations: Implementation) -> None:
        self.implementations = implementations
        self.choose_again()

    def choose_again(self) -> None:
        """Forget the candidates of calls so far.

        The dictionary is replaced and not cleared: another thread may be storing what it found before.
        """
        self._candidates = {}

    def named(self, name: str) -> Implementation:
        """The implementation of that name. Raises OpError listing the known ones."""
        for implementation in self.implementations:
            if implementation.name == name:
                return implementation
        known = ", ".join(self.implementation_names)
        raise OpError(f"op {self.name} has no implementation '{name}'; it has: {known}")

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        call = self.bind(*args, **kwargs)
        try:
            implementation = self._choose(call)
            used = _recording.get()
            if used is not None:
                used[self.name].add(implementation.name)
            result: R = implementation.run(call)
            return result
        except Exception:
            self.shapes.check(self.name, call)  # a wrong shape is said in the words of the contract
            raise

    def chosen(self, *args: P.args, **kwargs: P.kwargs) -> Implementation:
        """The implementation that such a call goes to. Raises OpError where one is forced and refuses it."""
        return self._choose(self.bind(*args, **kwargs))

    def _choose(self, call: Any) -> Implementation:
        first = call[0]
        kind = (first.device, first.dtype)
        for implementation in self._candidates.get(kind) or self._find_candidates(*kind):
            reason = implementation.refusal(call)
            if reason is None:
                return implementation
        # The torch reference takes every call, so this implementation was forced.
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

    def _find_candidates(self, device: torch.device, dtype: torch.dtype) -> tuple[Implementation, ...]:
        """Available implementations for calls of one kind; remembered, so that a call costs one look-up."""
        read_environment()
        candidates = self._candidates  # before what is forced is read: see choose_again
        forced = self.forced
        if forced is not None:
            reason = forced.available() or forced.takes(device.type, dtype)
            if reason:
                raise self._forced_error(forced, reason)
            found: tuple[Implementation, ...] = (forced,)
        else:
            found = tuple(
                i
                for i in self.implementations
                if not (i.on_request or i.takes(device.type, dtype) or i.available())
            )
        if _make_range is not None:
            found = tuple(self._in_range(implementation, _make_range) for implementation in found)
        candidates[device, dtype] = found
        return found

    def _in_range(self, implementation: Implementation, make_range: RangeMaker) -> Implementation:
        """The implementation, every run of it inside a range named "op [implementation]"."""
        run, name = implementation.run, f"{self.name} [{implementation.name}]"

        def run_in_range(call: Any) -> Any:
            with make_range(name):
                return run(call)

        return replace(implementation, run=run_in_range)

    def _forced_error(self, forced: Implementation, reason: str) -> OpError:
        return OpError(
            f"op {self.name} was forced to '{forced.name}', which cannot run here: {reason}. "
            f"Drop the choice ({ENVIRONMENT_VARIABLE} or ops.force) or choose '{REFERENCE}'"
        )

    def choices(self, device: str, dtype: torch.dtype, weight: torch.dtype | None = None) -> list[Choice]:
        """Every implementation with its standing for calls of this device type, dtype and dtype of weights.

        An op that has one dtype only (sampling from float32 logits) is listed for that one.
        """
        read_environment()
        dtype = dtype if dtype in self.tolerance else next(iter(self.tolerance))
        found: list[Choice] = []
        forced = self.forced
        for implementation in self.implementations:
            reason = implementation.takes(device, dtype, weight) or implementation.available()
            if reason is None and forced is not None and implementation.name != forced.name:
                reason = f"'{forced.name}' is forced"
            if reason is None and implementation.on_request and forced is None:
                reason = f"runs on request: {ENVIRONMENT_VARIABLE}={self.name}={implementation.name}"
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


def op(
    shapes: str = "",
    *,
    tolerance: float | Mapping[torch.dtype, float],
    out_dtype: str | torch.dtype | None = None,
) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Make the decorated torch function an op under its own name: its docstring is the contract.

    Args:
        shapes: The shapes of the tensors and of the result, in the notation of shapes.py.
        tolerance: Per dtype of a result, or a number for both float32 and bfloat16; see Op.
        out_dtype: The dtype of a result for which no memory is given, or the name of the argument that
            is it. None is that of the first argument.
    """

    def register(reference: Callable[P, R]) -> Op[P, R]:
        found = Op(reference, shapes, tolerance, out_dtype)
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
    global _environment_read
    if _environment_read:
        return
    with _lock:
        forced: list[tuple[Op[Any, Any], Implementation]] = []
        for entry in filter(str.strip, os.environ.get(ENVIRONMENT_VARIABLE, "").split(",")):
            op_name, equals, implementation_name = (part.strip() for part in entry.partition("="))
            if not equals:
                raise OpError(
                    f"{ENVIRONMENT_VARIABLE}: '{entry.strip()}' is not of the form op=implementation"
                )
            target = find(op_name)
            forced.append((target, target.named(implementation_name)))
        if not _environment_read:
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
            used[name].update(implementations)


def used() -> dict[str, tuple[str, ...]]:
    """Deprecated: what the calling thread's last recording noted; use `recording_usage`."""
    warnings.warn("ops.used() is deprecated: use ops.recording_usage()", DeprecationWarning, stacklevel=2)
    noted: Mapping[str, set[str]] = getattr(_last, "used", {})
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


def choices(device: str, dtype: torch.dtype, weight: torch.dtype | None = None) -> list[Choice]:
    """Every implementation of every op with its standing for calls of this device type and these dtypes.

    Args:
        dtype: Of activations.
        weight: Of weight matrices; None is that of activations.
    """
    return [choice for name in sorted(_ops) for choice in _ops[name].choices(device, dtype, weight or dtype)]
