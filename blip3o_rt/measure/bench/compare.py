"""What changed between two bench records, and whether it is more than noise.

A change is the ratio of the medians, after over before. Its interval is a bootstrap over the samples (95%).
Where both records timed the same baseline on a line, in the same version, the change is taken relative to the
baseline's own: a machine that was slower altogether slowed the baseline as much.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from blip3o_rt.errors import ParameterError
from blip3o_rt.measure.records import OURS, BenchRecord, Line

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
    """One line of both records. change: median after / before, relative to `baseline` where there is one."""

    line: str
    before: float
    after: float
    change: float
    low: float
    high: float
    samples: int
    baseline: str | None
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary; `baseline` has the key "peer"."""
        found = asdict(self)
        return {"peer" if key == "baseline" else key: value for key, value in found.items()}


def compare_files(before: Path, after: Path, *, force: bool = False) -> list[Verdict]:
    """Verdicts of all lines of ours and ops that both records have.

    Raises ParameterError for a file that is no bench record, and, unless forced, for records of different
    machines or models.
    """
    first, second = BenchRecord.load(before), BenchRecord.load(after)
    found = differences(first, second)
    if found and not force:
        raise ParameterError(f"the records are not comparable: {'; '.join(found)} (--force compares anyway)")
    return compare_records(first, second)


def differences(before: BenchRecord, after: BenchRecord) -> list[str]:
    """What makes two records incomparable, in words."""
    machine = ("cpu", "cores", "gpu", "instruction_sets")
    model = ("size", "dtype", "tier", "device", "threads")
    pairs = [(key, before.machine.get(key), after.machine.get(key)) for key in machine]
    pairs += [(key, before.model.get(key), after.model.get(key)) for key in model]
    first, second = before.switches, after.switches
    pairs += [(key, first.get(key), second.get(key)) for key in {**first, **second}]
    return [f"{key} is {old} in the first, {new} in the second" for key, old, new in pairs if old != new]


def compare_records(before: BenchRecord, after: BenchRecord) -> list[Verdict]:
    """Verdicts of all lines of ours and ops that both records have samples of."""
    found = []
    first, second = _lines(before), _lines(after)
    for (name, batch, who), line in first.items():
        if who == OURS and (name, batch, who) in second:
            baseline = _common_baseline(line, before, after)
            controls = None
            if baseline is not None:
                controls = first[name, batch, baseline].samples, second[name, batch, baseline].samples
            new = second[name, batch, who].samples
            found.append(judge(line.label, line.samples, new, baseline=baseline, controls=controls))
    ops = [{op.label: op.samples for op in record.ops if op.samples} for record in (before, after)]
    found += [judge(label, ops[0][label], ops[1][label]) for label in ops[0] if label in ops[1]]
    return found


def judge(
    line: str,
    before: Sequence[float],
    after: Sequence[float],
    *,
    baseline: str | None = None,
    controls: tuple[Sequence[float], Sequence[float]] | None = None,
) -> Verdict:
    """The verdict on two lists of samples; controls are a baseline's at the same two times."""
    lists = [before, after, *(controls or ())]
    centres = [float(np.median(samples)) for samples in lists]
    change = _change(centres)
    generator = np.random.default_rng(0)  # the same records give the same verdict
    resampled = [_resampled_medians(samples, generator) for samples in lists]
    tail = (1 - COVERAGE) / 2
    low, high = (float(x) for x in np.quantile(_change(resampled), (tail, 1 - tail)))
    fewest = min(len(samples) for samples in lists)
    verdict = _verdict(low, high, fewest)
    return Verdict(line, centres[0], centres[1], change, low, high, fewest, baseline, verdict)


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
            f"relative to {verdict.baseline}" if verdict.baseline else "",
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


def _lines(record: BenchRecord) -> dict[tuple[str, int, str], Line]:
    return {(line.name, line.batch, line.who): line for line in record.lines if line.samples}


def _common_baseline(line: Line, before: BenchRecord, after: BenchRecord) -> str | None:
    """The baseline that both records timed most often on a line, in the same version of its packages."""
    second, found = _lines(after), {}
    for key, other in _lines(before).items():
        name, batch, who = key
        packages = PACKAGE_OF.get(who, OTHER_PACKAGES)
        same = all(before.versions.get(p) == after.versions.get(p) for p in packages)
        if (name, batch) == (line.name, line.batch) and who != OURS and key in second and same:
            found[who] = min(other.count, second[key].count)
    return max(found, key=lambda who: found[who], default=None)
