"""What each switch is worth: its line with the switch off and on, in turns, everything else alike.

A switch of its own is one entry of SWITCHES. Every op that runs on anything but its torch reference is a
switch without being listed: off is the reference. So is every switch of the fast tier that was given, and
every one that changes weights.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from blip3o_rt import graphs, ops, switches
from blip3o_rt.ar.kv_cache import DEFAULT_PAGE_SIZE
from blip3o_rt.checkpoint.load import Checkpoint
from blip3o_rt.dit.conditioning import ConditionTokens
from blip3o_rt.errors import CheckpointError, ConfigError, ParameterError
from blip3o_rt.measure.bench import lines
from blip3o_rt.measure.bench.lines import MORE_RUNS, WEIGHTS
from blip3o_rt.measure.bench.record import Record
from blip3o_rt.measure.bench.samples import median
from blip3o_rt.measure.bench.stages import SEED, ArStage, DitStage, TatokStage, VaeStage
from blip3o_rt.measure.bench.subject import Subject
from blip3o_rt.measure.bench.timing import Contender, Plan, Timing, quiet, race
from blip3o_rt.ops import native
from blip3o_rt.ops.registry import REFERENCE
from blip3o_rt.params import SamplingParams

if TYPE_CHECKING:
    from blip3o_rt.measure.bench.run import Settings

PICTURES = 4  # of the switch of batching
ALL_OPS = "all ops"
PROMPTS, TOKENS, STEP, EDIT, DECODER = "ar.prefill", "ar.token", "dit.step", "dit.step.edit", "vae.decode"
STEPS, ALL_STEPS = (STEP, EDIT), "dit.denoise"
# Lines that show a switch of the fast tier, by what its name begins with; any other is one of all steps.
FAST_LINES = {"ar_": (PROMPTS, TOKENS), "dit_": STEPS, "vae_": (DECODER,)}


@dataclass(frozen=True)
class Variant:
    """One side of a switch: its label, and what is changed for it.

    forced: ops to an implementation. isa: the instruction set. options: of the line's stage. environment:
    variables. fast: settings of the fast tier's switches, None for off.
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
        (TOKENS,),
        Variant("whole vocabulary", options={"image_tokens_only": False}),
        Variant("image tokens only"),
    ),
    Switch(
        "key/value pages",
        (TOKENS,),
        Variant("64 positions", options={"page_size": 64}),
        Variant(f"{DEFAULT_PAGE_SIZE} positions"),
    ),
    Switch(
        "batching",
        (TOKENS,),
        Variant(f"{PICTURES} pictures, each alone", options={"alone": PICTURES}),
        Variant(f"{PICTURES} pictures together", options={"batch": PICTURES}),
    ),
    Switch(
        "AVX-512 kernels",
        (TOKENS,),
        Variant("avx2", isa="avx2"),
        Variant("avx512", isa="avx512"),
        available=lambda device: device.type == "cpu" and "avx512" in _isas(),
    ),
    Switch(
        "null tokens",
        STEPS,
        Variant("every one is a key", options={"null_written_out": True}),
        Variant("each distinct one once"),
    ),
    Switch(
        "graphs",
        (TOKENS, *STEPS, DECODER),
        Variant("a launch per kernel", environment={graphs.ENVIRONMENT_VARIABLE: "off"}),
        Variant("recorded, replayed"),
        available=lambda device: device.type == "cuda",
    ),
)


def ar_prefill(checkpoint: Checkpoint) -> Contender:
    return Contender("", ArStage(checkpoint, max_batch=1).prefill)


def ar_token(
    checkpoint: Checkpoint,
    *,
    image_tokens_only: bool = True,
    page_size: int = DEFAULT_PAGE_SIZE,
    batch: int = 1,
    alone: int = 1,
) -> Contender:
    """A decoded token of each of `batch` pictures, or of `alone` pictures one after the other."""
    sampling = SamplingParams(seed=SEED, image_tokens_only=image_tokens_only)
    stages = [
        ArStage(checkpoint, max_batch=batch, sampling=sampling, page_size=page_size) for _ in range(alone)
    ]
    loops = [stage.tokens(batch) for stage in stages]

    def prepare() -> None:
        for loop in loops:
            loop.prepare()

    return Contender("", lambda: [loop() for loop in loops], prepare)


def dit_step(checkpoint: Checkpoint, *, edit: bool = False, null_written_out: bool = False) -> Contender:
    """A denoising step; null_written_out: each token of the unconditional branch is a key of its own."""
    stage = DitStage(checkpoint, edit=edit)
    if null_written_out:
        stage.tokens = written_out(stage.tokens)
    return Contender("", stage.step, stage.prepare)


def written_out(tokens: ConditionTokens) -> ConditionTokens:
    """The same condition, each unconditional token as if no other were identical to it."""
    counts = torch.tensor(tokens.null_counts, device=tokens.null.device)
    every = tokens.null.repeat_interleave(counts, dim=0, output_size=sum(tokens.null_counts))
    return replace(tokens, null=every, null_counts=(1,) * len(every))


def dit_denoise(checkpoint: Checkpoint) -> Contender:
    stage = DitStage(checkpoint)
    return Contender("", stage.denoise, stage.prepare_denoise)


def dit_step_edit(checkpoint: Checkpoint, **options: Any) -> Contender:
    return dit_step(checkpoint, edit=True, **options)


def vae_decode(checkpoint: Checkpoint) -> Contender:
    return Contender("", VaeStage(checkpoint).decode)


def tatok_encode(checkpoint: Checkpoint) -> Contender:
    return Contender("", TatokStage(checkpoint).encode)


@dataclass(frozen=True)
class Shown:
    """A line that shows switches: the parts it needs, its contender, and whether ops are switched there."""

    parts: tuple[str, ...]
    build: Callable[..., Contender]
    ops: bool = True


LINES: Mapping[str, Shown] = {
    PROMPTS: Shown(ArStage.parts, ar_prefill, ops=False),
    TOKENS: Shown(ArStage.parts, ar_token),
    "tatok.encode": Shown(TatokStage.parts, tatok_encode),
    STEP: Shown(DitStage.parts, dit_step),
    EDIT: Shown(DitStage.parts, dit_step_edit, ops=False),
    ALL_STEPS: Shown(DitStage.parts, dit_denoise, ops=False),
    DECODER: Shown(VaeStage.parts, vae_decode),
}


def select(names: Sequence[str]) -> frozenset[str]:
    """The lines that --ablate means. Raises ParameterError for a name that means none."""
    return lines.select(names, known=tuple(LINES), option="ablate")


def time_switches(subject: Subject, settings: Settings, record: Record, say: Callable[[str], None]) -> None:
    """Record every switch of those lines asked for that the checkpoint has."""
    found = {
        line: [*listed(line, subject.device), *fast_switches(line, subject)]
        for line in LINES
        if line in settings.ablate
    }
    chosen = {line: LINES[line] for line, some in found.items() if some or LINES[line].ops}
    total = sum(weight(line) for line in chosen)
    for line, shown in chosen.items():
        seconds = settings.seconds * weight(line) / total
        runs = settings.runs * MORE_RUNS.get(line, 1)
        try:
            checkpoint = subject.load(shown.parts)
            contender = shown.build(checkpoint)
            if shown.ops:
                found[line] += op_switches(line, contender)
            del contender
        except ConfigError as reason:
            record.note(f"switches of {line} left out: {reason}")
            continue
        for switch in found[line]:
            plan = Plan(runs, seconds / len(found[line]))
            try:
                entry, error = time_switch(switch, line, subject, checkpoint, plan)
            except (CheckpointError, ParameterError) as reason:
                record.note(f"switch {switch.name} of {line} left out: {reason}")
                continue
            except Exception as failure:  # a side that cannot be built, and the other switches go on
                record.fail(f"switch {switch.name} of {line}", failure)
                continue
            if error is not None:
                record.fail(f"switch {switch.name} of {line}", error)
            else:
                record.add_ablation(entry)
                say(f"{line}, {switch.name}: {switch.on.label} {entry['ratio']:.2f}x of {switch.off.label}")


def listed(line: str, device: torch.device) -> Iterator[Switch]:
    """The switches of SWITCHES that a line shows and this machine has for the device."""
    return (switch for switch in SWITCHES if line in switch.lines and switch.available(device))


def weight(line: str) -> float:
    """Share of the time budget, relative to others; all steps take as much as everything else of the DiT."""
    return WEIGHTS.get(line, 2 * WEIGHTS[EDIT])


def fast_switches(line: str, subject: Subject) -> Iterator[Switch]:
    """Switches of the fast tier that a line shows: those given, and all that change weights and run here."""
    for name, switch in switches.SWITCHES.items():
        shown = next((found for start, found in FAST_LINES.items() if name.startswith(start)), (ALL_STEPS,))
        settings = list(filter(None, (switch.default, *switch.devices))) if switch.weights else []
        if name in subject.switches:
            settings = [subject.switches[name]]
        for setting in dict.fromkeys(settings):
            if line in shown and switch.runs_on(setting, subject.device.type):
                on = Variant(f"{setting} (fast tier)", fast={name: setting})
                yield Switch(f"{name}={setting}", shown, Variant("without", fast={name: None}), on)


def op_switches(line: str, contender: Contender) -> Iterator[Switch]:
    """One switch for each op that the line runs on another implementation than its reference, and all."""
    with quiet():
        contender.prepare()
        with ops.recording_usage() as noted:
            contender.call()
    used = {op: sorted(names) for op, names in sorted(noted.items()) if names != {REFERENCE}}
    for op, names in used.items():
        yield Switch(op, (line,), Variant(REFERENCE, {op: REFERENCE}), Variant(", ".join(names)))
    if len(used) > 1:
        reference = Variant(REFERENCE, dict.fromkeys(used, REFERENCE))
        yield Switch(ALL_OPS, (line,), reference, Variant("as chosen"))


def time_switch(
    switch: Switch, line: str, subject: Subject, checkpoint: Checkpoint, plan: Plan
) -> tuple[dict[str, Any], Exception | None]:
    """The record's entry, or why there is none. `checkpoint` is the subject's own."""
    variants = (switch.off, switch.on)
    timings = [Timing(), Timing()]
    with _restored(variants):
        contenders = [_under(variant, line, subject, checkpoint) for variant in variants]
        race(contenders, timings, subject.device, plan)
    error = next((timing.error for timing in timings if timing.error is not None), None)
    off, on = (timing.samples for timing in timings)
    entry = {
        "switch": switch.name,
        "off": switch.off.label,
        "on": switch.on.label,
        "line": line,
        "samples_off": off,
        "samples_on": on,
        "ratio": median(off) / median(on) if off and on else None,
    }
    return entry, error


def _under(variant: Variant, line: str, subject: Subject, checkpoint: Checkpoint) -> Contender:
    """The line's contender, built and called with its variant's implementations and instruction set.

    Built too: a stage may record its work when it is built.
    """
    own = variant.of(subject)
    if own.switches != subject.switches:
        checkpoint = own.load(LINES[line].parts)

    def choose() -> None:
        for op_name, op in ops.all_ops().items():
            wanted = variant.forced.get(op_name)
            op.force(op.named(wanted) if wanted is not None else None)
        if variant.isa is not None:
            native.cpu().set_isa(variant.isa)

    with _restored([variant]), _environment(variant.environment):
        choose()
        contender = LINES[line].build(checkpoint, **variant.options)

    def prepare() -> None:
        choose()
        with _environment(variant.environment):
            contender.prepare()

    return Contender(variant.label, contender.call, prepare)


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
