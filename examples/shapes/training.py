"""What every training stage shares: resumable state, weight averages and the log."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)
SAVE_EVERY = 200  # steps: what a kill can cost
Bars = dict[str, float]  # the least that each of a stage's measures must reach


class GateError(RuntimeError):
    """A finished stage is worse than the next one can use."""


def enforce(stage: str, measured: dict[str, float], bars: Bars) -> None:
    """Prints what a finished stage measures, and raises GateError where that is under a bar."""
    print(json.dumps({stage: measured}))
    under = [
        f"{name} is {measured[name]:g}, under {bar:g}" for name, bar in bars.items() if measured[name] < bar
    ]
    if under:
        raise GateError(f"{stage}: {'; '.join(under)}. Train it longer (--steps), or go on with --no-gate")


def add_gate_option(parser: argparse.ArgumentParser) -> None:
    """The option --no-gate of every stage."""
    help = "finish without a word where the stage measures less than the next one needs"
    parser.add_argument("--no-gate", dest="gate", action="store_false", help=help)


def autocast() -> torch.autocast:
    """bfloat16 where the processor computes with it, else float32: emulated, it takes five times as long."""
    return torch.autocast("cpu", torch.bfloat16, enabled="AVX512" in torch.backends.cpu.get_cpu_capability())


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up, then a cosine to two per cent of the peak at the last step."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


class WeightAverage:
    """Exponential moving average of modules' parameters; its memory starts short and grows."""

    def __init__(self, modules: Iterable[nn.Module], decay: float) -> None:
        self.parameters = [p for module in modules for p in module.parameters()]
        self.decay = decay
        self.average = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the average towards the weights after an optimiser step."""
        decay = min(self.decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(self.average, self.parameters, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges weights and averages; a second call puts them back."""
        for parameter, average in zip(self.parameters, self.average, strict=True):
            held = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(held)


def save_atomically(state: dict[str, Any], path: Path) -> None:
    """Writes a training state so that a kill leaves the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def load_state(path: Path) -> dict[str, Any] | None:
    """A training state saved before, or None where there is none."""
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None


def finished_module(module: Module, path: Path) -> Module:
    """Fills a module with the averaged weights a stage left behind, frozen, in evaluation mode."""
    state = load_state(path)
    if state is None:
        raise FileNotFoundError(f"{path} is missing; run the stage that writes it first")
    module.load_state_dict(state["model"])
    return module.eval().requires_grad_(False)


class Log:
    """Appends one JSON line per report: the step, the seconds so far, the mean of every number."""

    def __init__(self, path: Path, every: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.every = path, every
        self.sums: dict[str, float] = {}
        self.count = 0
        self.started = time.monotonic()

    def add(
        self, step: int, values: dict[str, float], extra: Callable[[], dict[str, float]] | None = None
    ) -> None:
        """Counts one step's numbers; every so often writes their means (and those extra() measures)."""
        self.count += 1
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        if (step + 1) % self.every:
            return
        line = {"step": step + 1, "seconds": round(time.monotonic() - self.started, 1)}
        line |= {name: round(value / self.count, 5) for name, value in self.sums.items()}
        if extra is not None:
            line |= extra()
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.sums, self.count = {}, 0
