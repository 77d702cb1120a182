"""The record of a run: saved after every line, so that an interrupted run keeps what it has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from blip3o_rt.measure.bench.ceilings import Ceiling
from blip3o_rt.measure.bench.compose import OURS
from blip3o_rt.measure.bench.samples import summary
from blip3o_rt.measure.bench.timing import Timing
from blip3o_rt.measure.bench.work import Work
from blip3o_rt.measure.provenance import record_head, write_record

FILE = "bench.json"


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
        self.save()

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
        """A contender's result on a line; one that failed says why in its note.

        Only ours counts as a failure of the run: a peer that cannot run here is a fact like its time.
        """
        if timing.error is not None:
            self.failures += who == OURS
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
        floor = self.floor(work, dtype, memory) if work is not None and median is not None else None
        if floor is None or median is None:
            return {"ceiling": None, "share": None}
        ceiling, seconds = floor
        return {"ceiling": ceiling, "share": seconds / median}

    def floor(self, work: Work, dtype: str, memory: str = "read") -> tuple[str, float] | None:
        """The ceiling that bounds the work, and the seconds it takes there; None where none was measured."""
        bytes_moved, matmul = (self._ceilings.get(key) for key in (memory, f"matmul {dtype}"))
        if bytes_moved is None or matmul is None:
            return None
        computes, seconds = work.floor(bytes_moved.per_second, matmul.per_second)
        return (matmul if computes else bytes_moved).key, seconds

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
        """Whether a line of ours failed or an op was wrong."""
        return self.failures > 0 or any(not entry["ok"] for entry in self.data["ops"])

    def save(self) -> None:
        """Write what there is."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_record(self.path, self.data)


def describe(error: BaseException) -> str:
    """An error in one line."""
    detail = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {detail}" if detail else type(error).__name__
