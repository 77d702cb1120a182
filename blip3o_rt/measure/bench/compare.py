"""What changed between two bench records, and whether it is more than noise.

A change is the ratio of the medians, after over before. Its interval is a bootstrap over the samples (95%).
Where both records timed the same peer on a line, in the same version, the change is taken relative to the
peer's own: a machine that was slower altogether slowed the peer as much.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from blip3o_rt.errors import ParameterError
from blip3o_rt.measure.bench.compose import OURS
from blip3o_rt.measure.provenance import RECORD_VERSION
from blip3o_rt.measure.reports.reading import set_apart

FASTER, SLOWER, SAME, UNSURE = "faster", "slower", "same", "unsure"
RESAMPLES = 4000
COVERAGE = 0.95
MARGIN = 0.02  # a change below this is the same, however sure
FEW, FEW_MARGIN = 5, 0.10  # fewer samples than this must part by more
LEAST = 3  # with fewer nothing can be said
PACKAGE_OF = {"transformers": ("transformers", "torch")}
OTHER_PACKAGES = ("diffusers", "transformers", "torch")


@dataclass(frozen=True)
class Verdict:
    """One line of both records. change: median after / before, relative to `peer` where there is one."""

    line: str
    before: float
    after: float
    change: float
    low: float
    high: float
    samples: int
    peer: str | None
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary."""
        return asdict(self)


def compare_files(before: Path, after: Path, *, force: bool = False) -> list[Verdict]:
    """Verdicts of all lines of ours and ops that both records have.

    Raises ParameterError for a file that is no bench record, and, unless forced, for records of different
    machines or models.
    """
    first, second = read_record(before), read_record(after)
    found = differences(first, second)
    if found and not force:
        raise ParameterError(f"the records are not comparable: {'; '.join(found)} (--force compares anyway)")
    return compare_records(first, second)


def read_record(path: Path) -> dict[str, Any]:
    """A bench record. Raises ParameterError."""
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
    return data


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What makes two records incomparable, in words."""
    compared = {
        "machine": ("cpu", "cores", "gpu", "instruction_sets"),
        "model": ("size", "dtype", "tier", "device", "threads"),
    }
    pairs = [
        (key, before[part].get(key), after[part].get(key)) for part, keys in compared.items() for key in keys
    ]
    first, second = set_apart(before["model"]), set_apart(after["model"])
    pairs += [(key, first.get(key), second.get(key)) for key in {**first, **second}]
    return [f"{key} is {old} in the first, {new} in the second" for key, old, new in pairs if old != new]


def compare_records(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Verdict]:
    """Verdicts of all lines of ours and ops that both records have samples of."""
    found = []
    first, second = _lines(before), _lines(after)
    for name, batch, who in first:
        if who == OURS and (name, batch, who) in second:
            peer = _common_peer(name, batch, before, after)
            controls = (first[name, batch, peer], second[name, batch, peer]) if peer else None
            label = f"{name} x{batch}" if batch > 1 else name
            old, new = first[name, batch, who], second[name, batch, who]
            found.append(judge(label, old, new, peer=peer, controls=controls))
    old_ops, new_ops = _ops(before), _ops(after)
    found += [judge(label, old_ops[label], new_ops[label]) for label in old_ops if label in new_ops]
    return found


def judge(
    line: str,
    before: Sequence[float],
    after: Sequence[float],
    *,
    peer: str | None = None,
    controls: tuple[Sequence[float], Sequence[float]] | None = None,
) -> Verdict:
    """The verdict on two lists of samples; controls are a peer's at the same two times."""
    lists = [before, after, *(controls or ())]
    centres = [float(np.median(samples)) for samples in lists]
    change = _change(centres)
    generator = np.random.default_rng(0)  # the same records give the same verdict
    resampled = [_resampled_medians(samples, generator) for samples in lists]
    tail = (1 - COVERAGE) / 2
    low, high = (float(x) for x in np.quantile(_change(resampled), (tail, 1 - tail)))
    fewest = min(len(samples) for samples in lists)
    verdict = _verdict(low, high, fewest)
    return Verdict(line, centres[0], centres[1], change, low, high, fewest, peer, verdict)


def _change(medians: Sequence[Any]) -> Any:
    """After over before, over the same of the controls where there are any."""
    change = medians[1] / medians[0]
    return change / (medians[3] / medians[2]) if len(medians) > 2 else change


def _resampled_medians(samples: Sequence[float], generator: np.random.Generator) -> np.ndarray:
    values = np.asarray(samples, dtype=np.float64)
    picked = generator.integers(len(values), size=(RESAMPLES, len(values)))
    return np.asarray(np.median(values[picked], axis=1))


def _verdict(low: float, high: float, samples: int) -> str:
    if samples < LEAST:
        return UNSURE
    margin = MARGIN if samples >= FEW else FEW_MARGIN
    if low > 1 + margin:
        return SLOWER
    return FASTER if high < 1 / (1 + margin) else SAME


def slower_than(verdicts: Sequence[Verdict], percent: float) -> bool:
    """Whether a line is surely slower by more than so many per cent."""
    return any(v.verdict == SLOWER and v.low > 1 + percent / 100 for v in verdicts)


def as_text(verdicts: Sequence[Verdict]) -> str:
    """The verdicts as a table, and how many of each there are."""
    if not verdicts:
        return "the records have no line in common"
    rows = [
        [
            verdict.line,
            f"{1000 * verdict.before:.4g} ms",
            f"{1000 * verdict.after:.4g} ms",
            _percent(verdict.change),
            f"{_percent(verdict.low)} to {_percent(verdict.high)}",
            str(verdict.samples),
            f"relative to {verdict.peer}" if verdict.peer else "",
            verdict.verdict,
        ]
        for verdict in verdicts
    ]
    headers = ["line", "before", "after", "change", f"{COVERAGE:.0%} interval", "n", "", "verdict"]
    counts = {kind: sum(v.verdict == kind for v in verdicts) for kind in (FASTER, SLOWER, SAME, UNSURE)}
    total = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    return f"{tabulate(rows, headers, disable_numparse=True)}\n\n{total}"


def _percent(change: float) -> str:
    return f"{100 * (change - 1):+.1f}%" if math.isfinite(change) else ""


def _lines(record: Mapping[str, Any]) -> dict[tuple[str, int, str], list[float]]:
    return {
        (line["name"], line["batch"], line["who"]): line["samples"]
        for line in record["lines"]
        if line["samples"]
    }


def _ops(record: Mapping[str, Any]) -> dict[str, list[float]]:
    return {
        f"{entry['op']} {entry['implementation']} {entry['dtype']}, {entry['shape']}": entry["samples"]
        for entry in record["ops"]
        if entry["samples"]
    }


def _common_peer(name: str, batch: int, before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
    """The peer that both records timed most often on a line, in the same version of its packages."""
    first, second = _lines(before), _lines(after)
    found = []
    for other, other_batch, who in first:
        key = (other, other_batch, who)
        packages = PACKAGE_OF.get(who, OTHER_PACKAGES)
        same = all(before["versions"].get(p) == after["versions"].get(p) for p in packages)
        if (other, other_batch) == (name, batch) and who != OURS and key in second and same:
            found.append((min(len(first[key]), len(second[key])), who))
    return max(found, key=lambda pair: pair[0])[1] if found else None
