"""What each switch is worth: its line with the switch off and on, in turns, everything else alike.

A switch of its own is one entry of SWITCHES. Every op that runs on anything but its torch reference is a
switch without being listed: off is the reference.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from blip3o_rt import ops
from blip3o_rt.ar.kv_cache import DEFAULT_PAGE_SIZE
from blip3o_rt.ar.layout import quantised
from blip3o_rt.bench.lines import MORE_RUNS, WEIGHTS
from blip3o_rt.bench.record import Record
from blip3o_rt.bench.samples import median
from blip3o_rt.bench.stages import SEED, ArStage, DitStage, TatokStage, VaeStage
from blip3o_rt.bench.subject import Subject
from blip3o_rt.bench.timing import Contender, Plan, Timing, quiet, race
from blip3o_rt.checkpoint.load import Checkpoint
from blip3o_rt.errors import ConfigError
from blip3o_rt.ops import native
from blip3o_rt.ops.registry import REFERENCE
from blip3o_rt.params import SamplingParams
from blip3o_rt.switches import AR_WEIGHTS, INT8

if TYPE_CHECKING:
    from blip3o_rt.bench.run import Settings

PICTURES = 4  # of the switch of batching
ALL_OPS = "all ops"


@dataclass(frozen=True)
class Variant:
    """One side of a switch: its label, ops forced to an implementation, instruction set, stage options."""

    label: str
    forced: Mapping[str, str] = field(default_factory=dict)
    isa: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Switch:
    """A switch and the stage line that shows it."""

    name: str
    line: str
    off: Variant
    on: Variant
    available: Callable[[torch.device], bool] = lambda device: True


def _isas() -> list[str]:
    module = native.cpu_module()
    return list(module.isas()) if module is not None else []


SWITCHES = (
    Switch(
        "image rows of the head",
        "ar.token",
        Variant("whole vocabulary", options={"image_tokens_only": False}),
        Variant("image tokens only"),
    ),
    Switch(
        "key/value pages",
        "ar.token",
        Variant("64 positions", options={"page_size": 64}),
        Variant(f"{DEFAULT_PAGE_SIZE} positions"),
    ),
    Switch(
        "batching",
        "ar.token",
        Variant(f"{PICTURES} pictures, each alone", options={"alone": PICTURES}),
        Variant(f"{PICTURES} pictures together", options={"batch": PICTURES}),
    ),
    Switch(
        f"{AR_WEIGHTS}={INT8}",
        "ar.token",
        Variant("as stored"),
        Variant("int8 weights (fast tier)", options={"int8": True}),
        available=lambda device: device.type == "cpu",
    ),
    Switch(
        "AVX-512 kernels",
        "ar.token",
        Variant("avx2", isa="avx2"),
        Variant("avx512", isa="avx512"),
        available=lambda device: device.type == "cpu" and "avx512" in _isas(),
    ),
)


def ar_token(
    checkpoint: Checkpoint,
    *,
    image_tokens_only: bool = True,
    page_size: int = DEFAULT_PAGE_SIZE,
    batch: int = 1,
    alone: int = 1,
    int8: bool = False,
) -> Contender:
    """A decoded token of each of `batch` pictures, or of `alone` pictures one after the other."""
    if int8 and AR_WEIGHTS not in checkpoint.switches:
        weights = {**checkpoint.weights, "ar": quantised(checkpoint.weights["ar"].items())}
        checkpoint = replace(checkpoint, weights=weights)
    sampling = SamplingParams(seed=SEED, image_tokens_only=image_tokens_only)
    stages = [
        ArStage(checkpoint, max_batch=batch, sampling=sampling, page_size=page_size) for _ in range(alone)
    ]
    loops = [stage.tokens(batch) for stage in stages]

    def prepare() -> None:
        for loop in loops:
            loop.prepare()

    return Contender("", lambda: [loop() for loop in loops], prepare)


def dit_step(checkpoint: Checkpoint) -> Contender:
    stage = DitStage(checkpoint)
    return Contender("", stage.step, stage.prepare)


def vae_decode(checkpoint: Checkpoint) -> Contender:
    return Contender("", VaeStage(checkpoint).decode)


def tatok_encode(checkpoint: Checkpoint) -> Contender:
    return Contender("", TatokStage(checkpoint).encode)


LINES: dict[str, tuple[tuple[str, ...], Callable[..., Contender]]] = {
    "ar.token": (ArStage.parts, ar_token),
    "tatok.encode": (TatokStage.parts, tatok_encode),
    "dit.step": (DitStage.parts, dit_step),
    "vae.decode": (VaeStage.parts, vae_decode),
}


def time_switches(subject: Subject, settings: Settings, record: Record, say: Callable[[str], None]) -> None:
    """Record every switch of every line that the checkpoint has."""
    total = sum(WEIGHTS[line] for line in LINES)
    for line, (parts, build) in LINES.items():
        seconds = settings.seconds * WEIGHTS[line] / total
        runs = settings.runs * MORE_RUNS.get(line, 1)
        try:
            checkpoint = subject.load(parts)
            switches = [*listed(line, subject.device), *op_switches(line, build(checkpoint))]
        except ConfigError as reason:
            record.note(f"switches of {line} left out: {reason}")
            continue
        for switch in switches:
            plan = Plan(runs, seconds / len(switches))
            entry, error = time_switch(switch, build, checkpoint, subject.device, plan)
            if error is not None:
                record.fail(f"switch {switch.name} of {line}", error)
            else:
                record.add_ablation(entry)
                say(f"{line}, {switch.name}: {switch.on.label} {entry['ratio']:.2f}x of {switch.off.label}")


def listed(line: str, device: torch.device) -> Iterator[Switch]:
    """The switches of SWITCHES that a line shows and this machine has for the device."""
    return (switch for switch in SWITCHES if switch.line == line and switch.available(device))


def op_switches(line: str, contender: Contender) -> Iterator[Switch]:
    """One switch for each op that the line runs on another implementation than its reference, and all."""
    ops.reset_used()
    with quiet():
        contender.prepare()
        contender.call()
    used = {op: names for op, names in ops.used().items() if names != (REFERENCE,)}
    for op, names in used.items():
        yield Switch(op, line, Variant(REFERENCE, {op: REFERENCE}), Variant(", ".join(names)))
    if len(used) > 1:
        yield Switch(ALL_OPS, line, Variant(REFERENCE, dict.fromkeys(used, REFERENCE)), Variant("as chosen"))


def time_switch(
    switch: Switch,
    build: Callable[..., Contender],
    checkpoint: Checkpoint,
    device: torch.device,
    plan: Plan,
) -> tuple[dict[str, Any], Exception | None]:
    """The record's entry, or why there is none."""
    variants = (switch.off, switch.on)
    timings = [Timing(), Timing()]
    with _restored(variants):
        contenders = [_under(variant, build(checkpoint, **variant.options)) for variant in variants]
        race(contenders, timings, device, plan)
    error = next((timing.error for timing in timings if timing.error is not None), None)
    off, on = (timing.samples for timing in timings)
    entry = {
        "switch": switch.name,
        "off": switch.off.label,
        "on": switch.on.label,
        "line": switch.line,
        "samples_off": off,
        "samples_on": on,
        "ratio": median(off) / median(on) if off and on else None,
    }
    return entry, error


def _under(variant: Variant, contender: Contender) -> Contender:
    """The contender with its variant's implementations and instruction set chosen before each call."""

    def prepare() -> None:
        for op_name, op in ops.all_ops().items():
            wanted = variant.forced.get(op_name)
            op.force(op.named(wanted) if wanted is not None else None)
        if variant.isa is not None:
            native.cpu().set_isa(variant.isa)
        contender.prepare()

    return Contender(variant.label, contender.call, prepare)


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
