"""A trace of the stages that were timed: one warm call of each of ours, beside what it took to get there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from blip3o_rt import trace
from blip3o_rt.errors import Blip3oError
from blip3o_rt.machine import exact_arithmetic
from blip3o_rt.measure.bench.lines import LINES, Cases, Settings
from blip3o_rt.measure.bench.subject import Subject
from blip3o_rt.measure.records import OURS


def trace_stages(subject: Subject, lines: frozenset[str], path: Path, log: Callable[[str], None]) -> None:
    """Write a trace (see blip3o_rt.trace) of one call of each stage line; `log` hears of those left out.

    A call is the range "bench LINE"; "load" and "warm-up" before it are what it took to get there.
    """
    settings = Settings(lines)
    chosen = [(spec.cases, spec.part) for spec in LINES if spec.name in lines]
    with exact_arithmetic(subject.device), trace.recorded(path, subject.device):
        for cases, part in dict.fromkeys(chosen):
            if cases is not None:
                try:
                    trace_part(subject, cases, part, settings)
                except Blip3oError as error:
                    log(f"not traced: {error}")


def trace_part(subject: Subject, cases: Cases, part: str | None, settings: Settings) -> None:
    """The cases of ours that share a part of the checkpoint."""
    with trace.span("load"):
        checkpoint = subject.load([part] if part else None)
    for case in cases(checkpoint, settings):
        for candidate in case.candidates:
            if candidate.who == OURS:
                with trace.span("warm-up"):
                    candidate.prepare()
                    candidate.call()
                    candidate.prepare()
                with trace.span(f"bench {case.name}"):
                    candidate.call()
