"""The schema of a bench record: what a run measured, as dataclasses that load from JSON and save to it.

The keys of the file are the names of the fields, but for those that KEYS gives another. A file may lack keys
or hold null: the field then has its default, so that the record of an interrupted or older run is read too.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from blip3o_rt.errors import ParameterError
from blip3o_rt.graphs import DEPENDENT_VARIABLE
from blip3o_rt.measure.provenance import RECORD_VERSION, record_head, write_record
from blip3o_rt.switches import SWITCHES

OURS = "ours"
BASELINES = ("transformers", "diffusers", "published", "published-compiled", "published-graphed")
COMPOSED = "composed: "  # how the note of an image begins that was added up from its stages
KEYS = {
    "fastest": "min",
    "count": "n",
    "roofline": "ceiling",
    "utilization": "share",
    "rooflines": "ceilings",
}
E = TypeVar("E", bound="Entry")
R = TypeVar("R", bound="Record")
T = TypeVar("T")


# Statistics


def median(samples: Sequence[float]) -> float:
    """The middle sample, or the mean of the middle two."""
    return percentile(samples, 0.5)


def percentile(samples: Sequence[float], fraction: float) -> float:
    """The sample that the fraction of all stays below, linear between two."""
    ordered = sorted(samples)
    place = fraction * (len(ordered) - 1)
    low, high = math.floor(place), math.ceil(place)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


# Reading and writing


def number(value: object) -> Any:
    """A finite number; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


class Entry:
    """A dataclass that is read from JSON by the types of its fields, and written to it."""

    @classmethod
    def of(cls: type[E], data: Mapping[str, Any]) -> E:
        """The entry of a JSON object; a field without a value of its type has its default."""
        found = {name: read(data.get(_key(name))) for name, read in _readers(cls).items()}  # type: ignore[arg-type]
        return cls(**{name: value for name, value in found.items() if value is not None})

    def to_json(self) -> dict[str, Any]:
        values = {_key(name): getattr(self, name) for name in _readers(type(self))}  # type: ignore[arg-type]
        return {key: _written(value) for key, value in values.items()}


def _written(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [entry.to_json() if isinstance(entry, Entry) else entry for entry in value]
    return value


def _key(name: str) -> str:
    return KEYS.get(name, name)


@functools.cache
def _readers(kind: type[Any]) -> dict[str, Callable[[Any], Any]]:
    """How the value of each field is read: None where it is none of the field's type."""
    hints = get_type_hints(kind)
    return {f.name: _reader(hints[f.name]) for f in fields(kind)}


def _reader(hint: Any) -> Callable[[Any], Any]:
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    origin, inner = get_origin(kinds[0]), get_args(kinds[0])
    if origin is list and isinstance(inner[0], type) and issubclass(inner[0], Entry):
        return lambda value: [inner[0].of(entry) for entry in value or () if isinstance(entry, Mapping)]
    if origin is list:
        return lambda value: list(map(str, value or ()))
    if origin is tuple:
        return lambda value: tuple(map(float, value or ()))
    if origin is dict:
        return lambda value: dict(value or {})
    if kinds[0] is str:
        return lambda value: None if value is None else str(value)
    return number if kinds[0] in (int, float) else lambda value: value


# Entries


@dataclass(kw_only=True)
class Timed(Entry):
    """Samples, in seconds of a call, and what is said of them where it is not given."""

    samples: tuple[float, ...] = ()
    median: float | None = None
    p90: float | None = None
    fastest: float | None = None
    count: int = 0
    bytes: int | None = None
    flops: int | None = None
    roofline: str | None = None
    utilization: float | None = None
    note: str | None = None

    def __post_init__(self) -> None:
        self.samples = tuple(self.samples)
        if self.samples:
            self.median = percentile(self.samples, 0.5) if self.median is None else self.median
            self.p90 = percentile(self.samples, 0.9) if self.p90 is None else self.p90
            self.fastest = min(self.samples) if self.fastest is None else self.fastest
            self.count = self.count or len(self.samples)


@dataclass(kw_only=True)
class Roofline(Entry):
    """What the machine does at best: "read", "copy" or "matmul", in GB/s or GFLOP/s."""

    name: str = "unnamed"
    dtype: str | None = None
    unit: str = ""
    value: float | None = None
    samples: tuple[float, ...] = ()

    @property
    def key(self) -> str:
        """The name that lines refer to: "read", "copy", "matmul bf16"."""
        return f"{self.name} {self.dtype}" if self.dtype else self.name

    @property
    def per_second(self) -> float:
        """Bytes or operations a second."""
        return (self.value or 0.0) * 1e9


@dataclass(kw_only=True)
class Line(Timed):
    """A stage as one candidate runs it.

    Attributes:
        who: "ours" or a baseline.
        per: units of work in a call, as tokens.
        cold: seconds of the first call.
        host: seconds that the host takes to queue a call on a GPU.
        roofline: key of the roofline that bounds the work.
        utilization: time at the roofline over the median: MBU below memory's, MFU below arithmetic's.
        launches: kernels of a call on a GPU. operator_calls: the same of operators, without one.
    """

    name: str = "unnamed"
    what: str = ""
    who: str = OURS
    batch: int = 1
    per: float = 1.0
    cold: float | None = None
    host: float | None = None
    peak_memory: int | None = None
    launches: int | None = None
    operator_calls: int | None = None

    @property
    def composed(self) -> bool:
        """Whether it was added up from the medians of its stages, not timed as a whole."""
        return (self.note or "").startswith(COMPOSED)

    @property
    def rate(self) -> float | None:
        """Units of work a second."""
        return self.per / self.median if self.median else None

    @property
    def label(self) -> str:
        return self.name if self.batch == 1 else f"{self.name} x{self.batch:.0f}"


@dataclass(kw_only=True)
class OpTime(Timed):
    """An implementation of an op at one shape; error, bound and ok: of its comparison with float64."""

    op: str = "unnamed"
    implementation: str = ""
    dtype: str = ""
    shape: Any = ""
    error: float | None = None
    bound: float | None = None
    ok: bool | None = None

    @property
    def label(self) -> str:
        return f"{self.op} {self.implementation} {self.dtype}, {shape_text(self.shape)}"


def shape_text(shape: object) -> str:
    """A shape as it is read: text as it is, a list as 2 x 1024 x 64."""
    if isinstance(shape, list | tuple):
        return " x ".join(str(side) for side in shape)
    return "" if shape is None else str(shape)


@dataclass(kw_only=True)
class Ablation(Entry):
    """A line with one thing off and on; ratio: its median with it off over that with it on."""

    switch: str = ""
    off: str = ""
    on: str = ""
    line: str = ""
    samples_off: tuple[float, ...] = ()
    samples_on: tuple[float, ...] = ()
    ratio: float | None = None


# A record


@dataclass(kw_only=True)
class Record(Entry):
    """The head of any record: which machine, versions, commit and command made it, and on which model.

    With a path, every change is saved: an interrupted run keeps what it has.
    """

    kind: str = "bench"
    version: int = RECORD_VERSION
    created: str = ""
    command: list[str] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    commit: str | None = None
    complete: bool = True
    model: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.path: Path | None = None

    @classmethod
    def begin(cls: type[R], path: Path, command: Sequence[str], model: Mapping[str, Any]) -> R:
        """A record that is saved at the path from now on."""
        record = cls.of({**record_head(cls.kind, command), "model": model})
        record.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        record.save()
        return record

    def save(self) -> None:
        if self.path is not None:
            write_record(self.path, self.to_json())

    def note(self, text: str) -> None:
        """Remember something about the run as a whole."""
        self.notes.append(text)
        self.save()

    def finish(self) -> None:
        """Everything asked for was measured, or says why not."""
        self.complete = True
        self.save()

    @property
    def device(self) -> str:
        """ "cuda" or "cpu"."""
        return "cuda" if str(self.model.get("device", "")).startswith("cuda") else "cpu"

    @property
    def machine_name(self) -> str | None:
        """The GPU or the processor that it was made on."""
        return self.machine.get("gpu" if self.device == "cuda" else "cpu")

    @property
    def switches(self) -> dict[str, str]:
        """What sets the model apart from others: switches of the fast tier, and graphs left out."""
        chosen = self.model.get("switches") or {}
        found = {name: str(chosen[name]) for name in SWITCHES if chosen.get(name)}
        found |= {"graphs": "off"} if chosen.get("graphs") == "off" else {}
        return found | ({"dependent launches": "on"} if chosen.get(DEPENDENT_VARIABLE) == "on" else {})


@dataclass(kw_only=True)
class BenchRecord(Record):
    """What a bench measured."""

    rooflines: list[Roofline] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    ops: list[OpTime] = field(default_factory=list)
    ablations: list[Ablation] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.failures = 0

    @classmethod
    def load(cls, path: Path) -> BenchRecord:
        """A bench record of this version. Raises ParameterError."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, ValueError) as error:
            raise ParameterError(f"{path} is not JSON ({error}): accepted is a bench.json") from None
        if not isinstance(data, dict) or data.get("kind") != "bench":
            raise ParameterError(f"{path} is not a bench record: accepted is a bench.json")
        if data.get("version") != RECORD_VERSION:
            raise ParameterError(
                f"{path} is a record of version {data.get('version')}: accepted is {RECORD_VERSION}"
            )
        return cls.of(data)

    def fail(self, what: str, error: BaseException) -> None:
        """Remember something that went wrong and has no entry to say so."""
        self.failures += 1
        self.note(f"{what} failed: {describe(error)}")

    def add(self, entry: Line | OpTime | Ablation) -> None:
        """Keep an entry from now on."""
        kept: Any = {Line: self.lines, OpTime: self.ops, Ablation: self.ablations}[type(entry)]
        kept.append(entry)
        self.save()

    @property
    def failed(self) -> bool:
        """Whether a line of ours failed or an op was wrong."""
        return self.failures > 0 or any(op.ok is False for op in self.ops)

    def roofline(self, name: str, dtype: str | None = None) -> Roofline | None:
        return next((r for r in self.rooflines if (r.name, r.dtype) == (name, dtype)), None)

    def bound(
        self, bytes_moved: int, flops: int, dtype: str, memory: str = "read"
    ) -> tuple[str, float] | None:
        """The roofline that bounds some work, and the seconds that the work takes there.

        Args:
            dtype: of the operands. A processor without products of bfloat16 widens them: its arithmetic is
                float32, and so is the roofline.
            memory: "read", or "copy" for what writes as much as it reads.

        Returns:
            None where no roofline of memory or arithmetic was measured.
        """
        moving, computing = self.roofline(memory), self.roofline("matmul", dtype)
        wide = self.roofline("matmul", "fp32")
        if computing and wide and wide.per_second > computing.per_second:
            computing = wide
        if not moving or not computing or not moving.value or not computing.value:
            return None
        seconds = (bytes_moved / moving.per_second, moving.key), (flops / computing.per_second, computing.key)
        longest = max(seconds)
        return longest[1], longest[0]


def describe(error: BaseException) -> str:
    """An error in one line."""
    detail = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {detail}" if detail else type(error).__name__


# Lines beside their baselines


@dataclass(frozen=True)
class Row:
    """One stage at one batch size: our line and those of the baselines."""

    name: str
    batch: int
    lines: Mapping[str, Line]  # who -> line

    @property
    def ours(self) -> Line | None:
        return self.lines.get(OURS)

    @property
    def what(self) -> str:
        return next((line.what for line in self.lines.values() if line.what), "")

    def ratio(self, who: str) -> float | None:
        """How many times our time a baseline takes."""
        ours, other = self.ours, self.lines.get(who)
        if ours is None or other is None or not ours.median or other.median is None:
            return None
        return other.median / ours.median


def rows(records: Iterable[BenchRecord], order: Sequence[str] = ()) -> list[Row]:
    """Stages of several records, oldest first, as if they were one: the newest of each name and batch.

    A row is taken whole, so that a baseline is only ever compared with what was timed beside it.
    """
    found: dict[tuple[str, int], dict[str, Line]] = {}
    for record in records:
        own: dict[tuple[str, int], dict[str, Line]] = {}
        for line in record.lines:
            own.setdefault((line.name, line.batch), {})[line.who] = line
        found |= own
    places = {name: place for place, name in enumerate(order)}
    keys = sorted(found, key=lambda key: (places.get(key[0], len(places)), key[1]))
    return [Row(name, batch, found[name, batch]) for name, batch in keys]


def baselines(table: Iterable[Row]) -> list[str]:
    """Who else was timed: known baselines in their order, then others."""
    seen = {who for row in table for who in row.lines} - {OURS}
    return [who for who in BASELINES if who in seen] + sorted(seen.difference(BASELINES))


def line_notes(lines: Iterable[Line]) -> Iterator[str]:
    """What a record says about single lines."""
    for line in lines:
        if line.note:
            yield f"{line.label}, {line.who}: {line.note}"


def slower_than(table: Iterable[Row]) -> list[str]:
    """Where a baseline takes less time than ours, in words."""
    found = []
    for row in table:
        for who in baselines([row]):
            ratio = row.ratio(who)
            if ratio is not None and ratio < 1:
                found.append(f"{row.lines[who].label}: {who} takes {ratio:.2f} of our time")
    return found


def read_records(folder: Path, kind: str, of: Callable[[Mapping[str, Any]], T]) -> list[T]:
    """The records of a kind anywhere below a folder, oldest first."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob(f"{kind}.json"))]
    kept = sorted((r for r in found if r.get("kind") == kind), key=lambda r: str(r.get("created")))
    return [of(record) for record in kept]
