"""What a run took: seconds and rate of each stage, the implementations used, and peak memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

if TYPE_CHECKING:
    import torch

# What one unit of a stage is called; one not named here has no unit. "tokens" includes reading the prompt.
STAGE_UNITS = {
    "reference": "image",
    "tokens": "token",
    "denoise": "step",
    "decode": "image",
}


@dataclass(frozen=True)
class Stage:
    """Time spent in one stage, summed over a request, and the units of work it did (0: not counted)."""

    name: str
    seconds: float
    work: int

    @property
    def rate(self) -> str:
        """Tokens per second, or milliseconds per step or image; empty where there is nothing to count."""
        if not self.work or self.seconds <= 0.0 or self.name not in STAGE_UNITS:
            return ""
        unit = STAGE_UNITS[self.name]
        if unit == "token":
            return f"{self.work / self.seconds:.1f} tokens/s"
        return f"{1000.0 * self.seconds / self.work:.1f} ms/{unit}"

    @property
    def work_text(self) -> str:
        """The units of work in words, for a table."""
        if not self.work or self.name not in STAGE_UNITS:
            return ""
        return f"{self.work} {STAGE_UNITS[self.name]}{'' if self.work == 1 else 's'}"


@dataclass(frozen=True)
class Report:
    """What one request took on this machine.

    implementations: op name -> names of the implementations its calls ran on.
    peak_memory_bytes: on a GPU the most allocated during the request; on the CPU the most the process has
    held resident since it started. not_recorded: what ran without a graph on a device that has graphs.
    """

    stages: tuple[Stage, ...]
    implementations: Mapping[str, tuple[str, ...]]
    peak_memory_bytes: int
    device: str
    dtype: str
    tier: str
    switches: Mapping[str, str] = field(default_factory=dict)
    not_recorded: tuple[str, ...] = ()

    @property
    def total_seconds(self) -> float:
        """Seconds of all stages together."""
        return sum(stage.seconds for stage in self.stages)

    def stage(self, name: str) -> Stage:
        """One stage by name; a stage that did not run took 0 seconds."""
        return next((stage for stage in self.stages if stage.name == name), Stage(name, 0.0, 0))

    @property
    def tokens_per_second(self) -> float:
        """Image tokens drawn per second of the token stage, which includes the prompt; 0 where none were."""
        tokens = self.stage("tokens")
        return tokens.work / tokens.seconds if tokens.seconds > 0.0 else 0.0

    @property
    def milliseconds_per_step(self) -> float:
        """Milliseconds per denoising step; 0 where none ran."""
        denoise = self.stage("denoise")
        return 1000.0 * denoise.seconds / denoise.work if denoise.work else 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary: seconds per stage, rates, implementations, bytes."""
        return {
            "device": self.device,
            "dtype": self.dtype,
            "tier": self.tier,
            "switches": dict(self.switches),
            "stages": {stage.name: {"seconds": stage.seconds, "work": stage.work} for stage in self.stages},
            "total_seconds": self.total_seconds,
            "tokens_per_second": self.tokens_per_second,
            "milliseconds_per_step": self.milliseconds_per_step,
            "peak_memory_bytes": self.peak_memory_bytes,
            "implementations": {op: list(names) for op, names in self.implementations.items()},
            "not_recorded": list(self.not_recorded),
        }

    def table(self) -> str:
        """The timing table a person reads."""
        rows = [[stage.name, f"{stage.seconds:.3f}", stage.work_text, stage.rate] for stage in self.stages]
        rows.append(["total", f"{self.total_seconds:.3f}", "", ""])
        headers = ["stage", "seconds", "work", "rate"]
        body = tabulate(rows, headers, disable_numparse=True, colalign=("left", "right", "right", "right"))
        memory = f"{self.peak_memory_bytes / 2**20:.0f} MiB"
        switches = ", ".join(f"{name}={setting}" for name, setting in self.switches.items())
        tier = f"tier {self.tier}" + (f" ({switches})" if switches else "")
        machine = f"{self.device}, {self.dtype}, {tier}; peak memory {memory}"
        eager = [f"without a graph: {', '.join(self.not_recorded)}"] if self.not_recorded else []
        return "\n".join([body, machine, *self._implementation_lines(), *eager])

    def _implementation_lines(self) -> list[str]:
        """One line per implementation, with the ops that ran on it."""
        names = sorted({name for used in self.implementations.values() for name in used})
        return [
            f"on {name}: {', '.join(op for op, used in sorted(self.implementations.items()) if name in used)}"
            for name in names
        ]

    def __str__(self) -> str:
        return self.table()


class StageTimer:
    """Adds up the seconds and units of work of each stage of a request, in the order they first ran.

    On a GPU the clock is read once the queued work has finished: a stage is charged for its own kernels.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device
        self._seconds: dict[str, float] = {}
        self._work: dict[str, int] = {}
        if device is not None and device.type == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats(device)

    def _now(self) -> float:
        if self._device is not None and self._device.type == "cuda":
            import torch

            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    @contextmanager
    def stage(self, name: str, work: int = 0) -> Iterator[None]:
        """Charge the block's time, and its units of work, to a stage; a block that raises did no units."""
        begin = self._now()
        done = 0
        try:
            yield
            done = work
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + self._now() - begin
            self._work[name] = self._work.get(name, 0) + done

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages so far."""
        return tuple(Stage(name, seconds, self._work[name]) for name, seconds in self._seconds.items())

    def report(
        self,
        implementations: Mapping[str, tuple[str, ...]],
        *,
        device: str,
        dtype: str,
        tier: str,
        switches: Mapping[str, str] | None = None,
        not_recorded: Sequence[str] = (),
    ) -> Report:
        """The report of everything timed so far."""
        peak = peak_memory_bytes(self._device)
        return Report(
            self.stages,
            dict(implementations),
            peak,
            device=device,
            dtype=dtype,
            tier=tier,
            switches=dict(switches or {}),
            not_recorded=tuple(not_recorded),
        )


def peak_memory_bytes(device: torch.device | None = None) -> int:
    """The most memory held: on a GPU since the last StageTimer began, on the CPU since the process began."""
    if device is not None and device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
