"""The record of a run: saved after every line, so that an interrupted run keeps what it has."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from blip3o_rt.bench.ceilings import Ceiling
from blip3o_rt.bench.timing import Timing, summary
from blip3o_rt.bench.work import Work
from blip3o_rt.machine import format_bytes
from blip3o_rt.provenance import record_head

FILE = "bench.json"
OURS = "ours"
UNITS = {  # what a line's work is counted in, where it is not a picture
    "ar.prefill": "token",
    "ar.token": "token",
    "ar.second_pass": "token",
    "dit.step": "step",
}


class Record:
    """A bench record in memory and, after every change, on disk."""

    def __init__(self, folder: Path, command: Sequence[str], model: Mapping[str, Any]) -> None:
        self.path = folder / FILE
        self.failures = 0
        self._ceilings: dict[str, Ceiling] = {}
        self.data: dict[str, Any] = {
            **record_head("bench", command),
            "model": dict(model),
            "ceilings": [],
            "lines": [],
            "ops": [],
            "ablations": [],
            "notes": [],
        }

    @property
    def lines(self) -> list[dict[str, Any]]:
        return list(self.data["lines"])

    def note(self, text: str) -> None:
        """Remember something about the run as a whole."""
        self.data["notes"].append(text)
        self.save()

    def fail(self, what: str, error: BaseException) -> None:
        """Remember something that went wrong and has no line to say so."""
        self.failures += 1
        self.note(f"{what} failed: {describe(error)}")

    def add_ceilings(self, ceilings: Sequence[Ceiling]) -> None:
        self._ceilings = {ceiling.key: ceiling for ceiling in ceilings}
        self.data["ceilings"] = [
            {"name": c.name, "dtype": c.dtype, "unit": c.unit, "value": c.value, "samples": c.samples}
            for c in ceilings
        ]
        self.save()

    def add_line(
        self,
        name: str,
        what: str,
        who: str,
        timing: Timing,
        *,
        batch: int,
        per: int,
        work: Work | None = None,
        launches: int | None = None,
        operator_calls: int | None = None,
        note: str | None = None,
    ) -> None:
        """A contender's result on a line; one that failed says why in its note."""
        if timing.error is not None:
            self.failures += 1
            failure = f"failed: {describe(timing.error)}"
            note = failure if note is None else f"{note}; {failure}"
        found = summary(timing.samples)
        self.data["lines"].append(
            {
                "name": name,
                "what": what,
                "who": who,
                "batch": batch,
                "samples": timing.samples,
                "cold": timing.cold,
                **found,
                "per": per,
                "bytes": work.bytes if work is not None else None,
                "flops": work.flops if work is not None else None,
                **self.share(work, self.data["model"]["dtype"], found["median"]),
                "peak_memory": timing.peak_memory,
                "launches": launches,
                "operator_calls": operator_calls,
                "note": note,
            }
        )
        self.save()

    def share(
        self, work: Work | None, dtype: str, median: float | int | None, memory: str = "read"
    ) -> dict[str, Any]:
        """The ceiling that bounds the work, and the share of it that was reached.

        memory: the ceiling of its bytes, "read", or "copy" for what writes as much as it reads.
        """
        bytes_moved, matmul = (self._ceilings.get(key) for key in (memory, f"matmul {dtype}"))
        if work is None or median is None or bytes_moved is None or matmul is None:
            return {"ceiling": None, "share": None}
        computes, floor = work.floor(bytes_moved.per_second, matmul.per_second)
        return {"ceiling": (matmul if computes else bytes_moved).key, "share": floor / median}

    def add_op(self, entry: Mapping[str, Any]) -> None:
        self.data["ops"].append(dict(entry))
        self.save()

    def add_ablation(self, entry: Mapping[str, Any]) -> None:
        self.data["ablations"].append(dict(entry))
        self.save()

    def finish(self) -> None:
        """Everything asked for was measured, or says why not."""
        self.data["complete"] = True
        self.save()

    @property
    def failed(self) -> bool:
        """Whether a line failed or an op was wrong."""
        return self.failures > 0 or any(not entry["ok"] for entry in self.data["ops"])

    def save(self) -> None:
        """Write the record beside its place and rename it: what is there is always a whole one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".{FILE}.{secrets.token_hex(4)}.part")
        try:
            partial.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
            partial.replace(self.path)
        finally:
            partial.unlink(missing_ok=True)


def describe(error: BaseException) -> str:
    """An error in one line."""
    detail = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {detail}" if detail else type(error).__name__


# What a person reads


def as_text(data: Mapping[str, Any]) -> str:
    """The record as tables: ceilings, lines, ops, ablations, notes."""
    sections = [
        _ceiling_text(data["ceilings"]),
        _table(LINE_HEADERS, line_rows(data["lines"])),
        _table(OP_HEADERS, op_rows(data["ops"])),
        _table(ABLATION_HEADERS, ablation_rows(data["ablations"])),
        "\n".join(_notes(data)),
    ]
    return "\n\n".join(filter(None, sections))


LINE_HEADERS = (
    "line",
    "batch",
    "who",
    "median",
    "p90",
    "min",
    "n",
    "cold",
    "rate",
    "of ceiling",
    "peak",
    "ours is",
)
OP_HEADERS = (
    "op",
    "shape",
    "dtype",
    "implementation",
    "median",
    "n",
    "GB/s",
    "GFLOP/s",
    "of ceiling",
    "error",
    "bound",
    "",
)
ABLATION_HEADERS = ("switch", "line", "off", "on", "off: median", "on: median", "gain")


def _ceiling_text(ceilings: Sequence[Mapping[str, Any]]) -> str:
    found = [
        f"{c['name']}{' ' + c['dtype'] if c['dtype'] else ''} {c['value']:.1f} {c['unit']}" for c in ceilings
    ]
    return f"ceilings: {', '.join(found)}" if found else ""


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    return tabulate(rows, headers, disable_numparse=True)


def line_rows(lines: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Lines as text; a peer's last column says how many times faster ours is."""
    ours = {(line["name"], line["batch"]): line["median"] for line in lines if line["who"] == OURS}
    rows = []
    for line in lines:
        own = ours.get((line["name"], line["batch"]))
        compared = line["who"] != OURS and own and line["median"]
        rows.append(
            [
                line["name"],
                str(line["batch"]),
                line["who"],
                *(format_seconds(line[key]) for key in ("median", "p90", "min")),
                str(line["n"]),
                format_seconds(line["cold"]),
                rate(line),
                _percent(line["share"]) + (f" {line['ceiling']}" if line["share"] else ""),
                format_bytes(line["peak_memory"]) if line["peak_memory"] else "",
                f"{line['median'] / own:.2f}x" if compared else "",
            ]
        )
    return rows


def op_rows(entries: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Ops as text."""
    return [
        [
            entry["op"],
            entry["shape"],
            entry["dtype"],
            entry["implementation"],
            format_seconds(entry["median"]),
            str(entry["n"]),
            _per_second(entry["bytes"], entry["median"]),
            _per_second(entry["flops"], entry["median"]),
            _percent(entry["share"]),
            f"{entry['error']:.1e}" if entry["error"] is not None else "",
            f"{entry['bound']:.1e}" if entry["bound"] is not None else "",
            "ok" if entry["ok"] else "WRONG",
        ]
        for entry in entries
    ]


def ablation_rows(entries: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Switches as text; the gain is how many times faster the line is with the switch on."""
    rows = []
    for entry in entries:
        off, on = (summary(entry[key])["median"] for key in ("samples_off", "samples_on"))
        gain = f"{entry['ratio']:.2f}x" if entry["ratio"] else ""
        times = [format_seconds(off), format_seconds(on)]
        rows.append([entry["switch"], entry["line"], entry["off"], entry["on"], *times, gain])
    return rows


def _notes(data: Mapping[str, Any]) -> list[str]:
    """Remarks on the run, and those of its lines, each once."""
    remarks = [
        f"{line['name']}{_times(line['batch'])}, {line['who']}: {line['note']}"
        for line in data["lines"]
        if line["note"]
    ]
    return [f"note: {text}" for text in dict.fromkeys([*data["notes"], *remarks])]


def _times(batch: int) -> str:
    return f" x{batch}" if batch > 1 else ""


def rate(line: Mapping[str, Any]) -> str:
    """Tokens per second, milliseconds per step, or pictures per second."""
    median, unit = line["median"], UNITS.get(line["name"], "image")
    if not median or line["name"] in ("image.host", "dit.tables"):
        return ""
    if unit == "step":
        return f"{1000 * median / line['per']:.1f} ms/step"
    return f"{line['per'] / median:.3g} {unit}s/s"


def format_seconds(value: float | None) -> str:
    """Seconds with three significant digits in a unit that fits."""
    if value is None:
        return ""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= 0.9995 * size or unit == "us":
            digits = max(0, 2 - math.floor(math.log10(max(value / size, 1e-3) * 1.0005)))
            return f"{value / size:.{digits}f} {unit}"
    raise AssertionError


def _percent(share: float | None) -> str:
    return f"{100 * share:.0f}%" if share is not None else ""


def _per_second(amount: int | None, median: float | None) -> str:
    return f"{amount / median / 1e9:.1f}" if amount and median else ""
