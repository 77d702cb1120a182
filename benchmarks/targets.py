"""What the project wants to reach at the published size, and how far the records of a machine are from it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from blip3o_rt.measure.bench.lines import ORDER
from blip3o_rt.measure.records import BenchRecord, Row, rows
from blip3o_rt.measure.units import number_text, ratio_text, share_text, time_text

FILE = Path(__file__).parent / "targets.json"


@dataclass(frozen=True)
class Target:
    """One figure to reach.

    Attributes:
        measure: "seconds" of a call, "rate" per second, "utilization" of the roofline, "ratio" of a
            baseline's time to ours, or "memory", our peak to that of the baseline.
        least, most: the bound.
        switches: of the fast tier, all that are on.
        gpu: what the GPU's name contains, where the figure is one of that GPU only.
    """

    name: str
    device: str
    line: str
    measure: str
    least: float | None = None
    most: float | None = None
    batch: int = 1
    size: str = "published"
    dtype: str = "bf16"
    tier: str = "exact"
    switches: Mapping[str, str] = field(default_factory=dict)
    gpu: str | None = None
    baseline: str | None = None

    def of_machine(self, machine: str | None, device: str) -> bool:
        """Whether it is a target of that GPU or processor (None: of any), on cuda or cpu."""
        return device == self.device and (machine is None or self.gpu is None or self.gpu in machine)

    @property
    def label(self) -> str:
        """The name, with the GPU where it is about one only."""
        return self.name if self.gpu is None else f"{self.name}, {self.gpu}"

    def matches(self, record: BenchRecord) -> bool:
        """Whether a bench record measures the model, dtype, tier and switches that it is about."""
        wanted = {"size": self.size, "dtype": self.dtype, "tier": self.tier}
        same = all(record.model.get(key) == value for key, value in wanted.items())
        return same and record.device == self.device and record.switches == self.switches

    def found(self, row: Row) -> float | None:
        """The figure that a row has."""
        line, other = row.ours, row.lines.get(self.baseline or "")
        if line is None:
            return None
        if self.measure == "ratio":
            return row.ratio(str(self.baseline))
        if self.measure == "memory":
            if other is None or not other.peak_memory or line.peak_memory is None:
                return None
            return line.peak_memory / other.peak_memory
        return {"seconds": line.median, "rate": line.rate, "utilization": line.utilization}[self.measure]

    def remark(self, row: Row) -> str:
        """What the record says of the lines that the figure is of: composed, and the like."""
        lines = [row.ours, row.lines.get(self.baseline or "")]
        found = ["composed" if line.composed else line.note for line in lines if line is not None]
        return "; ".join(dict.fromkeys(filter(None, found)))

    def text(self, value: float | None) -> str:
        """A figure of this target in its unit."""
        if value is None:
            return ""
        form = {
            "seconds": time_text,
            "utilization": share_text,
            "ratio": ratio_text,
            "memory": share_text,
        }
        return form[self.measure](value) if self.measure in form else f"{number_text(value)}/s"

    @property
    def bound(self) -> str:
        """The bound in words."""
        return (
            f"at least {self.text(self.least)}"
            if self.least is not None
            else f"at most {self.text(self.most)}"
        )

    def met(self, value: float) -> bool:
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)


@dataclass(frozen=True)
class Standing:
    """A target and the figure measured for it, None where there is none, and what is to be said of it."""

    target: Target
    value: float | None
    remark: str = ""

    @property
    def word(self) -> str:
        if self.value is None:
            return "not measured"
        verdict = "met" if self.target.met(self.value) else "falls short"
        return f"{verdict} ({self.remark})" if self.remark else verdict


def targets(path: Path = FILE) -> list[Target]:
    """All targets."""
    return [Target(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]


def standings(records: Sequence[BenchRecord], machine: str | None, device: str) -> list[Standing]:
    """Where a machine's records stand with its targets. machine: its GPU or processor, None for any."""
    result = []
    for target in targets():
        if target.of_machine(machine, device):
            table = rows((record for record in records if target.matches(record)), ORDER)
            row = next((row for row in table if (row.name, row.batch) == (target.line, target.batch)), None)
            if row is None:
                result.append(Standing(target, None))
            else:
                result.append(Standing(target, target.found(row), target.remark(row)))
    return result
