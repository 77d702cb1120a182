"""What each switch is worth: its line with the switch off and on, in turns, everything else alike.

A switch of its own is one entry of SWITCHES. Every op that runs on anything but its torch reference is a
switch without being listed: off is the reference. So is every switch of the fast tier that was given, and
every one that changes weights.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from blip3o_rt import graphs, ops, switches
from blip3o_rt.ar.kv_cache import DEFAULT_PAGE_SIZE
from blip3o_rt.checkpoint.load import Checkpoint
from blip3o_rt.errors import CheckpointError, ConfigError, ParameterError
from blip3o_rt.measure.bench.lines import BY_NAME, DENOISE
from blip3o_rt.measure.bench.subject import Subject
from blip3o_rt.measure.bench.timing import Candidate, Timing, quiet, race
from blip3o_rt.measure.records import Ablation, BenchRecord, median
from blip3o_rt.ops import native
from blip3o_rt.ops.registry import REFERENCE

IMAGES = 4  # of the switch of batching
ALL_OPS, DEPENDENT = "all ops", "dependent launches"
PREFILL, TOKEN, STEP, EDIT, DECODE = "ar.prefill", "ar.token", "dit.step", "dit.step.edit", "vae.decode"
STEPS = (STEP, EDIT)
WITH_OPS = (TOKEN, "tatok.encode", STEP, DECODE)  # lines whose ops are switched
# Lines that show a switch of the fast tier, by what its name begins with; any other is one of all steps.
FAST_LINES = {"ar_": (PREFILL, TOKEN), "dit_": STEPS, "vae_": (DECODE,)}


@dataclass(frozen=True)
class Variant:
    """One side of a switch: its label, and what is changed for it.

    Attributes:
        forced: ops to an implementation.
        isa: the instruction set.
        options: of the line's candidate.
        environment: variables.
        fast: settings of the fast tier's switches, None for off.
    """

    label: str
    forced: Mapping[str, str] = field(default_factory=dict)
    isa: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    fast: Mapping[str, str | None] = field(default_factory=dict)

    def of(self, subject: Subject) -> Subject:
        """The subject with this side's switches of the fast tier."""
        chosen = {**subject.switches, **self.fast}
        return replace(subject, switches={name: text for name, text in chosen.items() if text is not None})


@dataclass(frozen=True)
class Switch:
    """A switch and the stage lines that show it."""

    name: str
    lines: tuple[str, ...]
    off: Variant
    on: Variant
    available: Callable[[torch.device], bool] = lambda device: True


def _isas() -> list[str]:
    module = native.cpu_module()
    return list(module.isas()) if module is not None else []


SWITCHES = (
    Switch(
        "image rows of the head",
        (TOKEN,),
        Variant("whole vocabulary", options={"image_tokens_only": False}),
        Variant("image tokens only"),
    ),
    Switch(
        "key/value pages",
        (TOKEN,),
        Variant("64 positions", options={"page_size": 64}),
        Variant(f"{DEFAULT_PAGE_SIZE} positions"),
    ),
    Switch(
        "batching",
        (TOKEN,),
        Variant(f"{IMAGES} images, each alone", options={"alone": IMAGES}),
        Variant(f"{IMAGES} images together", options={"batch": IMAGES}),
    ),
    Switch(
        "AVX-512 kernels",
        (TOKEN,),
        Variant("avx2", isa="avx2"),
        Variant("avx512", isa="avx512"),
        available=lambda device: device.type == "cpu" and "avx512" in _isas(),
    ),
    Switch(
        "unconditional tokens",
        STEPS,
        Variant("every one is a key", options={"every_token": True}),
        Variant("each distinct one once"),
    ),
    Switch(
        "graphs",
        (TOKEN, *STEPS, DECODE),
        Variant("a launch per kernel", environment={graphs.ENVIRONMENT_VARIABLE: "off"}),
        Variant("captured, replayed"),
        available=lambda device: device.type == "cuda",
    ),
    Switch(
        DEPENDENT,
        (TOKEN,),
        Variant("each behind the last", environment={graphs.DEPENDENT_VARIABLE: "off"}),
        Variant("each as the last ends", environment={graphs.DEPENDENT_VARIABLE: "on"}),
        available=lambda device: device.type == "cuda",
    ),
)


def ablate(
    subject: Subject, chosen: Iterable[str], runs: int, record: BenchRecord, log: Callable[[str], None]
) -> None:
    """Record every switch of the chosen lines that the checkpoint has."""
    for line, spec in BY_NAME.items():
        found = [*listed(line, subject.device), *fast_switches(line, subject)]
        if line not in chosen or not (found or line in WITH_OPS):
            continue
        try:
            checkpoint = subject.load([spec.part] if spec.part else None)
            if line in WITH_OPS:
                found += op_switches(line, checkpoint)
        except ConfigError as reason:
            record.note(f"switches of {line} left out: {reason}")
            continue
        for switch in found:
            try:
                entry = time_switch(switch, line, subject, checkpoint, runs)
            except (CheckpointError, ParameterError) as reason:
                record.note(f"switch {switch.name} of {line} left out: {reason}")
            except Exception as failure:  # a side that cannot be built or fails, and the other switches go on
                record.fail(f"switch {switch.name} of {line}", failure)
            else:
                record.add(entry)
                log(f"{line}, {switch.name}: {switch.on.label} {entry.ratio or 0:.2f}x of {switch.off.label}")


def listed(line: str, device: torch.device) -> Iterator[Switch]:
    """The switches of SWITCHES that a line shows and this machine has for the device."""
    return (switch for switch in SWITCHES if line in switch.lines and switch.available(device))


def fast_switches(line: str, subject: Subject) -> Iterator[Switch]:
    """Switches of the fast tier that a line shows: those given, and all that change weights and run here."""
    for name, switch in switches.SWITCHES.items():
        shown = next((found for start, found in FAST_LINES.items() if name.startswith(start)), (DENOISE,))
        settings = list(filter(None, (switch.default, *switch.devices))) if switch.weights else []
        if name in subject.switches:
            settings = [subject.switches[name]]
        for setting in dict.fromkeys(settings):
            if line in shown and switch.runs_on(setting, subject.device.type):
                on = Variant(f"{setting} (fast tier)", fast={name: setting})
                yield Switch(f"{name}={setting}", shown, Variant("without", fast={name: None}), on)


def op_switches(line: str, checkpoint: Checkpoint) -> Iterator[Switch]:
    """One switch for each op that the line runs on another implementation than its reference, and all."""
    candidate = build(line, checkpoint)
    with quiet():
        candidate.prepare()
        with ops.recording_usage() as noted:
            candidate.call()
    used = {op: sorted(names) for op, names in sorted(noted.items()) if names != {REFERENCE}}
    for op, names in used.items():
        yield Switch(op, (line,), Variant(REFERENCE, {op: REFERENCE}), Variant(", ".join(names)))
    if len(used) > 1:
        reference = Variant(REFERENCE, dict.fromkeys(used, REFERENCE))
        yield Switch(ALL_OPS, (line,), reference, Variant("as chosen"))


def build(line: str, checkpoint: Checkpoint, **options: Any) -> Candidate:
    """Our candidate of a line; it is eager where there are no graphs."""
    ours = BY_NAME[line].ours
    assert ours is not None
    candidate = ours(checkpoint, **options)
    candidate.eager = not graphs.graphs_wanted()
    return candidate


def time_switch(switch: Switch, line: str, subject: Subject, checkpoint: Checkpoint, runs: int) -> Ablation:
    """The record's entry; raises what a side raised. `checkpoint` is the subject's own."""
    variants = (switch.off, switch.on)
    timings = [Timing(), Timing()]
    with _restored(variants):
        race([_under(v, line, subject, checkpoint) for v in variants], timings, subject.device, runs)
    for timing in timings:
        if timing.error is not None:
            raise timing.error
    off, on = (tuple(timing.samples) for timing in timings)
    return Ablation(
        switch=switch.name,
        off=switch.off.label,
        on=switch.on.label,
        line=line,
        samples_off=off,
        samples_on=on,
        ratio=median(off) / median(on),
    )


def _under(variant: Variant, line: str, subject: Subject, checkpoint: Checkpoint) -> Candidate:
    """The line's candidate, built and called with its variant's implementations and instruction set.

    Built too: a stage may capture its work when it is built.
    """
    own = variant.of(subject)
    if own.switches != subject.switches:
        part = BY_NAME[line].part
        checkpoint = own.load([part] if part else None)

    def choose() -> None:
        for op_name, op in ops.all_ops().items():
            wanted = variant.forced.get(op_name)
            op.force(op.named(wanted) if wanted is not None else None)
        if variant.isa is not None:
            native.cpu().set_isa(variant.isa)

    with _restored([variant]), _environment(variant.environment):
        choose()
        candidate = build(line, checkpoint, **variant.options)

    def prepare() -> None:
        choose()
        with _environment(variant.environment):
            candidate.prepare()

    return replace(candidate, who=variant.label, prepare=prepare)


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables within the block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _restored(variants: Iterable[Variant]) -> Iterator[None]:
    """Put back what was forced, and the instruction set, after the block."""
    forced = {op: op.force(None) for op in ops.all_ops().values()}
    isa = native.cpu().isa() if any(variant.isa for variant in variants) else None
    try:
        yield
    finally:
        for op, implementation in forced.items():
            op.force(implementation)
        if isa is not None:
            native.cpu().set_isa(isa)
