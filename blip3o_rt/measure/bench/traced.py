"""A trace of the stages that were timed: one warm call of each of ours, beside what it took to get there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from blip3o_rt import trace
from blip3o_rt.errors import Blip3oError
from blip3o_rt.machine import exact_arithmetic
from blip3o_rt.measure.bench.compose import OURS
from blip3o_rt.measure.bench.lines import GROUPS, Choice, Group
from blip3o_rt.measure.bench.subject import Subject

BATCH = 1


def trace_stages(subject: Subject, stages: frozenset[str], path: Path, say: Callable[[str], None]) -> None:
    """Write a trace (see blip3o_rt.trace) of one call of each stage line; `say` hears of those left out.

    A call is the range "bench LINE"; "load" and "warm-up" before it are what it took to get there.
    """
    choice = Choice(stages, peers=(), batches=(BATCH,))
    with exact_arithmetic(subject.device), trace.recorded(path, subject.device):
        for group in GROUPS:
            if stages.intersection(group.names):
                try:
                    trace_group(subject, group, choice)
                except Blip3oError as error:
                    say(f"not traced: {error}")


def trace_group(subject: Subject, group: Group, choice: Choice) -> None:
    """The lines of ours that share the group's parts of the checkpoint."""
    with trace.span("load"):
        checkpoint = subject.load(group.parts)
    for line in group.lines(checkpoint, choice):
        for entry in line.entries:
            if entry.contender.who == OURS:
                with trace.span("warm-up"):
                    entry.contender.prepare()
                    entry.contender.call()
                    entry.contender.prepare()
                with trace.span(f"bench {line.name}"):
                    entry.contender.call()
