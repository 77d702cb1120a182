"""A bench record as its pages need it: lines beside their peers, whatever parts of the record are there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from blip3o_rt.measure.bench.compose import COMPOSED, OURS, parts_of_ours, parts_of_published
from blip3o_rt.measure.bench.rate import rate_text
from blip3o_rt.measure.bench.samples import summary
from blip3o_rt.switches import SWITCHES

PEERS = ("transformers", "diffusers", "published", "published-compiled", "published-graphed")
STAGES = (
    "tatok.encode",
    "vae.encode",
    "ar.prefill",
    "ar.token",
    "ar.second_pass",
    "connector",
    "dit.tables",
    "dit.condition",
    "dit.step",
    "dit.step.edit",
    "vae.decode",
    "image",
    "image.host",
)

PUBLISHED = ("published", "published-compiled", "published-graphed")

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Line:
    """One timed thing: seconds per call, and what a call does. What the record does not say is None."""

    name: str
    who: str = OURS
    what: str = ""
    batch: int = 1
    samples: tuple[float, ...] = ()
    median: float | None = None
    p90: float | None = None
    least: float | None = None
    count: int = 0
    cold: float | None = None
    per: float = 1.0  # units of work in a call
    bytes: float | None = None
    flops: float | None = None
    ceiling: str | None = None
    share: float | None = None
    peak_memory: float | None = None
    launches: float | None = None
    operator_calls: float | None = None
    note: str | None = None

    @property
    def composed(self) -> bool:
        """Whether it was not timed as a whole, but added up from the medians of its stages."""
        return (self.note or "").startswith(COMPOSED)

    @property
    def rate(self) -> float | None:
        """Units of work per second."""
        return self.per / self.median if self.median else None

    @property
    def rate_text(self) -> str:
        """The rate in words, where it says something."""
        return rate_text(self.name, self.per, self.median)


def read_line(entry: Mapping[str, Any]) -> Line:
    """A line of the record; its median, p90, least and count come from its samples where it has none."""
    samples = tuple(float(sample) for sample in entry.get("samples") or ())
    of_samples = summary(samples)
    return Line(
        name=str(entry.get("name", "unnamed")),
        who=str(entry.get("who") or OURS),
        what=str(entry.get("what") or ""),
        batch=int(entry.get("batch") or 1),
        samples=samples,
        median=number(entry, "median", of_samples["median"]),
        p90=number(entry, "p90", of_samples["p90"]),
        least=number(entry, "min", of_samples["min"]),
        count=int(entry.get("n") or len(samples)),
        cold=number(entry, "cold"),
        per=number(entry, "per") or 1.0,
        bytes=number(entry, "bytes"),
        flops=number(entry, "flops"),
        ceiling=entry.get("ceiling"),
        share=number(entry, "share"),
        peak_memory=number(entry, "peak_memory"),
        launches=number(entry, "launches"),
        operator_calls=number(entry, "operator_calls"),
        note=entry.get("note"),
    )


def number(entry: Mapping[str, Any], key: str, otherwise: float | None = None) -> float | None:
    """A finite number of an entry; `otherwise` where it has none."""
    value = entry.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return otherwise
    return float(value)


@dataclass(frozen=True)
class Row:
    """One stage at one batch size: our line and the peers'."""

    name: str
    batch: int
    lines: Mapping[str, Line] = field(default_factory=dict)  # who -> line

    @property
    def ours(self) -> Line | None:
        return self.lines.get(OURS)

    @property
    def what(self) -> str:
        return next((line.what for line in self.lines.values() if line.what), "")

    def ratio(self, who: str) -> float | None:
        """How many times our time the peer takes."""
        ours, peer = self.ours, self.lines.get(who)
        if ours is None or peer is None or not ours.median or peer.median is None:
            return None
        return peer.median / ours.median


def set_apart(model: Mapping[str, Any]) -> dict[str, str]:
    """What sets a record's "model" apart from others: switches of the fast tier, and graphs left out."""
    chosen = model.get("switches") or {}
    found = {name: str(chosen[name]) for name in SWITCHES if chosen.get(name)}
    return found | ({"graphs": "off"} if chosen.get("graphs") == "off" else {})


def entries(record: Record, key: str) -> list[Mapping[str, Any]]:
    """A list of the record; empty where it is missing or null."""
    return [entry for entry in record.get(key) or [] if isinstance(entry, Mapping)]


def rows(record: Record) -> list[Row]:
    """Stages in the order of a request, each batch size apart."""
    found: dict[tuple[str, int], dict[str, Line]] = {}
    for line in map(read_line, entries(record, "lines")):
        found.setdefault((line.name, line.batch), {})[line.who] = line
    order = {name: place for place, name in enumerate(STAGES)}
    keys = sorted(found, key=lambda key: (order.get(key[0], len(order)), key[1]))
    return [Row(name, batch, found[name, batch]) for name, batch in keys]


def peers(table: Sequence[Row]) -> list[str]:
    """Who else was timed: known peers in their order, then others."""
    seen = {who for row in table for who in row.lines} - {OURS}
    return [who for who in PEERS if who in seen] + sorted(seen.difference(PEERS))


def notes(table: Sequence[Row]) -> list[str]:
    """What the record says about single lines."""
    lines = [line for row in table for line in row.lines.values() if line.note]
    batches = [f" at batch {line.batch}" if line.batch > 1 else "" for line in lines]
    said = (f"{line.name}{at}, {line.who}: {line.note}" for line, at in zip(lines, batches, strict=True))
    return list(dict.fromkeys(said))


def picture_parts(record: Record) -> dict[str, dict[str, float]]:
    """who -> stage -> seconds of one picture, put together from the stages' medians.

    Only those whose stages were all timed; empty where the record does not say how many tokens and steps a
    picture takes.
    """
    model = record.get("model") or {}
    tokens, steps = number(model, "tokens_per_image"), number(model, "steps")
    if tokens is None or steps is None:
        return {}
    medians = {
        (line.name, line.who): line.median
        for line in map(read_line, entries(record, "lines"))
        if line.batch == 1 and line.median is not None
    }
    recipes = {OURS: parts_of_ours(int(tokens), int(steps), 1)}
    recipes |= {who: parts_of_published(int(tokens), int(steps), 1, who) for who in PUBLISHED}
    return {
        who: {part.line: part.count * medians[part.line, part.who] for part in parts}
        for who, parts in recipes.items()
        if all((part.line, part.who) in medians for part in parts)
    }


def provenance(record: Record) -> list[tuple[str, str]]:
    """What produced the record, as (label, text); what it does not say is left out."""
    machine, versions = record.get("machine") or {}, record.get("versions") or {}
    model = record.get("model") or {}
    gpu = machine.get("gpu")
    driver = f", driver {machine['driver']}" if machine.get("driver") else ""
    cores = f", {machine['cores']} cores" if machine.get("cores") else ""
    memory = machine.get("memory_bytes")
    switches = [
        f"{name} = {setting_text(value)}" for name, value in (model.get("switches") or {}).items() if value
    ]
    labelled = [
        ("model", ", ".join(filter(None, [model.get("size"), model.get("dtype")]))),
        ("tier", model.get("tier")),
        ("device", model.get("device")),
        ("threads", model.get("threads")),
        ("switches", "; ".join(switches)),
        ("GPU", f"{gpu}{driver}" if gpu else "none" if machine else None),
        ("processor", f"{machine['cpu']}{cores}" if machine.get("cpu") else None),
        ("instruction sets", ", ".join(machine.get("instruction_sets") or ())),
        ("memory", f"{memory / 2**30:.1f} GiB" if isinstance(memory, int | float) else None),
        ("versions", ", ".join(f"{name} {value}" for name, value in versions.items() if value)),
        ("commit", record.get("commit")),
        ("made", record.get("created")),
        ("command", " ".join(map(str, record.get("command") or ()))),
    ]
    return [(label, str(text)) for label, text in labelled if text not in (None, "")]


def setting_text(value: object) -> str:
    """A switch's setting in words; where it is one per op, each with its op."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {setting}" for key, setting in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
