"""A whole run: ceilings, then stage lines beside their peers, ops and switches, into one record."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from blip3o_rt import ops
from blip3o_rt.ar.kv_cache import DEFAULT_PAGE_SIZE
from blip3o_rt.checkpoint.parts import dtype_name
from blip3o_rt.errors import Blip3oError
from blip3o_rt.graphs import graphs_wanted
from blip3o_rt.machine import exact_arithmetic
from blip3o_rt.measure.bench import ceilings, compose, peers, work
from blip3o_rt.measure.bench.budget import Budget
from blip3o_rt.measure.bench.compose import OURS
from blip3o_rt.measure.bench.count import kernel_launches, operator_calls
from blip3o_rt.measure.bench.lines import GROUPS, MORE_RUNS, Choice, Entry, Group, Line
from blip3o_rt.measure.bench.record import Record, describe
from blip3o_rt.measure.bench.samples import median
from blip3o_rt.measure.bench.stages import STEPS, ArStage, ImageStage
from blip3o_rt.measure.bench.subject import Subject
from blip3o_rt.measure.bench.timing import Plan, Timing, quiet, race
from blip3o_rt.measure.units import time_text
from blip3o_rt.ops import native
from blip3o_rt.ops.registry import ENVIRONMENT_VARIABLE
from blip3o_rt.ops.user_kernels import UserKernel

IMAGE_LINES = {"image", "image.host"}
SPOKEN_SECONDS = 30.0  # a line that may take as long is announced
COUNTED_SECONDS = 5.0  # a call that takes longer is not repeated only to count its launches


@dataclass(frozen=True)
class Settings:
    """What a run measures, and how long it may take.

    stages: names of lines (empty: none). peers: those that can run here. op_names: None for no ops. ablate:
    names of lines whose switches are measured. seconds: of all stage lines together, and of all switches.
    quick: inputs of the ceilings too small to mean anything, for trying out.
    """

    tier: str
    batches: tuple[int, ...]
    stages: frozenset[str]
    peers: tuple[str, ...]
    op_names: tuple[str, ...] | None
    ablate: frozenset[str]
    runs: int
    seconds: float
    quick: bool = False
    steps: int = STEPS


def model_entry(subject: Subject, tier: str, kernels: Sequence[UserKernel]) -> dict[str, Any]:
    """The record's "model": what was measured, and every switch that was set."""
    chosen = {c.op: c.implementation for c in ops.choices(subject.device.type, subject.dtype) if c.chosen}
    return {
        "size": subject.size,
        "dtype": dtype_name(subject.dtype),
        "tier": tier,
        "device": str(subject.device),
        "threads": torch.get_num_threads(),
        "tokens_per_image": subject.config().image_tokens.tokens_per_image,
        "steps": STEPS,
        "switches": {
            "ops": chosen,
            ENVIRONMENT_VARIABLE: os.environ.get(ENVIRONMENT_VARIABLE),
            "graphs": "on" if graphs_wanted() else "off",
            native.ISA_VARIABLE: os.environ.get(native.ISA_VARIABLE),
            "kernels": [f"{kernel.op}={kernel.implementation}" for kernel in kernels],
            "image_tokens_only": True,
            "kv_page_size": DEFAULT_PAGE_SIZE,
            **subject.switches,
        },
    }


class Run:
    """One run. `say` is given a line for people as soon as something is measured."""

    def __init__(
        self, subject: Subject, settings: Settings, record: Record, say: Callable[[str], None]
    ) -> None:
        self.subject, self.settings, self.record, self.say = subject, settings, record, say
        self.config = subject.config()
        self.choice = Choice(settings.stages, settings.peers, settings.batches)
        names = [name for name in settings.stages if name != "image.host"]
        by_batch = ("ar.token", "image")
        self.too_long: dict[int, float] = {}  # batch -> seconds that its pictures take at least
        self.budget = Budget(
            settings.seconds,
            [name for name in names for _ in (settings.batches if name in by_batch else (1,))],
        )

    def everything(self) -> None:
        """All that the settings ask for. What was measured before an interruption is in the record."""
        with exact_arithmetic(self.subject.device):
            self.ceilings()
            self.plan_images()
            for group in GROUPS:
                self.group(group)
            if IMAGE_LINES & self.settings.stages:
                self.images()
            if self.settings.op_names is not None:
                self.ops()
            if self.settings.ablate:
                self.ablations()
        self.record.finish()

    def ceilings(self) -> None:
        found = ceilings.measure(self.subject.device, quick=self.settings.quick)
        if self.settings.quick:
            self.record.note("quick: the ceilings are too small to mean anything")
        self.record.add_ceilings(found)
        self.say(", ".join(f"{ceiling.key} {ceiling.value:.1f} {ceiling.unit}" for ceiling in found))

    def plan_images(self) -> None:
        """Leave no time for pictures that cannot be drawn in it: it is worth more to the other lines."""
        if "image" in self.settings.stages:
            alone = self.settings.stages <= IMAGE_LINES
            room = self.settings.seconds if alone else self.settings.seconds / 2
            for batch in self.settings.batches:
                least = self.least_seconds(batch)
                if least is not None and least > room:
                    self.too_long[batch] = least
                    self.budget.drop("image")

    def group(self, group: Group) -> None:
        """The lines of a group, with only its parts in memory; a part that cannot be had leaves a note."""
        chosen = [name for name in group.names if name in self.settings.stages]
        if not chosen:
            return
        try:
            for line in group.lines(self.subject.load(group.parts), self.choice):
                self.line(line)
        except Blip3oError as error:
            self.leave_out(chosen, error)
        free_memory(self.subject.device)

    def note(self, text: str) -> None:
        self.record.note(text)
        self.say(text)

    def leave_out(self, names: Sequence[str], error: Blip3oError) -> None:
        self.note(f"{', '.join(names)} left out: {error}")
        for name in names:
            self.budget.drop(name)

    def line(self, line: Line, plan: Plan | None = None) -> list[Timing]:
        """Race the line's contenders and record each, even if interrupted."""
        if plan is None:
            plan = Plan(self.settings.runs * MORE_RUNS.get(line.name, 1), self.budget.take(line.name))
        if plan.seconds >= SPOKEN_SECONDS:
            whos = " and ".join(entry.contender.who for entry in line.entries)
            self.say(f"{line.name}: timing {whos} for up to {plan.seconds / 60:.1f} minutes")
        timings = [Timing() for _ in line.entries]
        counts: list[dict[str, int]] = [{} for _ in line.entries]
        try:
            race([entry.contender for entry in line.entries], timings, self.subject.device, plan)
            counts = [self.count(entry, timing) for entry, timing in zip(line.entries, timings, strict=True)]
        finally:
            for entry, timing, count in zip(line.entries, timings, counts, strict=True):
                if timing.cold is not None or timing.error is not None:
                    self.add(line, entry, timing, count)
            self.say(spoken(line, timings))
        return timings

    def add(self, line: Line, entry: Entry, timing: Timing, count: dict[str, int]) -> None:
        self.record.add_line(
            line.name,
            line.what,
            entry.contender.who,
            timing,
            batch=line.batch,
            per=line.per,
            work=entry.work,
            note=entry.note,
            **count,
        )

    def count(self, entry: Entry, timing: Timing) -> dict[str, int]:
        """Launches of one more call on a GPU, operator calls on the CPU; none of what takes long or fails."""
        on_gpu = self.subject.device.type == "cuda"
        uncountable = not on_gpu and entry.contender.who in peers.WHO.values()  # nothing but compiled code
        if not timing.samples or uncountable or min(timing.samples) > COUNTED_SECONDS:
            return {}
        with quiet():
            entry.contender.prepare()
            call = entry.contender.call
            return {"launches": kernel_launches(call)} if on_gpu else {"operator_calls": operator_calls(call)}

    # Whole pictures

    def images(self) -> None:
        """Pictures end to end: drawn where the budget has room for it, else composed of their stages."""
        drawn = [batch for batch in self.settings.batches if self.affordable(batch)]
        for batch in self.settings.batches:
            if batch not in drawn:
                self.compose(batch)
        if not drawn:
            return
        checkpoint = self.subject.load()
        stage = ImageStage(checkpoint, max_batch=max(drawn), steps=self.settings.steps)
        prompt = ArStage.prompt(checkpoint)
        modes: dict[str, str | None] = {"published": None} if "published" in self.settings.peers else {}
        others = {
            who: peers.ImagePeer(checkpoint, prompt, mode, self.settings.steps)
            for who, mode in (modes | dict(self.choice.compiled())).items()
        }
        for batch in drawn:
            line = image_line(batch)
            line.add(OURS, partial(stage.draw, batch))
            for who, peer in others.items():
                line.add(who, partial(peer.draw, batch))
            self.image(line, stage)
        del stage, others, checkpoint
        free_memory(self.subject.device)

    def image(self, line: Line, stage: ImageStage) -> None:
        """Draw one line's pictures, and record the host's time of ours; a single run counts as a sample."""
        estimate, seconds = self.estimate(line.batch), self.budget.take("image")
        once = estimate is not None and 2 * estimate > max(seconds, self.budget.left)
        try:
            if once:
                self.drawn_once(line)
            else:
                self.line(line, Plan(self.settings.runs, seconds))
        finally:
            drawn = [found for found in self.record.lines if (found["name"], found["who"]) == ("image", OURS)]
            count = next((found["n"] for found in drawn if found["batch"] == line.batch), 0)
            first = 0 if once else 1  # the cold one
            warm = Timing(samples=stage.host.get(line.batch, [])[first : first + count])
            if "image.host" in self.settings.stages and warm.samples:
                what = "end to end minus its stages"
                self.record.add_line("image.host", what, OURS, warm, batch=line.batch, per=line.per)

    def drawn_once(self, line: Line) -> None:
        """Each contender's first call is its only one."""
        timings = [Timing() for _ in line.entries]
        try:
            race([entry.contender for entry in line.entries], timings, self.subject.device, Plan(0, 0.0))
        finally:
            for entry, timing in zip(line.entries, timings, strict=True):
                if timing.cold is not None:
                    timing.samples.append(timing.cold)
                    entry.note = "its only run is its first"
                if timing.samples or timing.error is not None:
                    self.add(line, entry, timing, {})
            self.say(spoken(line, timings))

    def recipes(self, batch: int) -> dict[str, list[compose.Part]]:
        """Who -> the stages that a picture of theirs consists of."""
        tokens, steps = self.config.image_tokens.tokens_per_image, self.settings.steps
        found = {OURS: compose.parts_of_ours(tokens, steps, batch)}
        who = ["published"] if "published" in self.settings.peers else []
        who += [name for name, _ in self.choice.compiled()]
        return found | {name: compose.parts_of_published(tokens, steps, batch, name) for name in who}

    def estimate(self, batch: int) -> float | None:
        """Seconds that one picture of every contender takes together; None where its stages are not known."""
        lines = self.record.lines
        found = [compose.composed(parts, lines) for parts in self.recipes(batch).values()]
        known = [seconds for seconds in found if seconds is not None]
        return sum(known) if known else None

    def least_seconds(self, batch: int) -> float | None:
        """What everybody's pictures take if all did our work, at the ceilings; None without ceilings."""
        config, itemsize = self.config, self.subject.dtype.itemsize
        rows = config.image_tokens.num_image_tokens
        token = work.ar_token(config.ar, itemsize, batch=batch, context=0, head_rows=rows)
        parts = (
            (config.image_tokens.tokens_per_image, token),
            (batch * self.settings.steps, work.dit_step(config, itemsize, shortened=True)),
            (batch, work.vae_decode(config, itemsize, shortened=True)),
        )
        floors = [(n, self.record.floor(part, dtype_name(self.subject.dtype))) for n, part in parts]
        known = [count * floor[1] for count, floor in floors if floor is not None]
        return len(self.recipes(batch)) * sum(known) if len(known) == len(parts) else None

    def affordable(self, batch: int) -> bool:
        """Whether the budget has room for one picture of everybody, as far as that is known."""
        estimate = self.estimate(batch)
        if estimate is None:
            return batch not in self.too_long
        return estimate <= self.budget.left

    def compose(self, batch: int) -> None:
        if batch not in self.too_long:
            self.budget.drop("image")
        line = image_line(batch)
        timings = []
        for who, parts in self.recipes(batch).items():
            seconds = compose.composed(parts, self.record.lines)
            if seconds is not None:
                timings.append(Timing(samples=[seconds]))
                line.add(who, lambda: None, note=compose.in_words(parts))
                self.add(line, line.entries[-1], timings[-1], {})
        if timings:
            self.say(spoken(line, timings) + " (composed)")
            return
        least = f"at least {time_text(self.too_long[batch])}" if batch in self.too_long else "longer"
        self.note(
            f"image{f' x{batch}' if batch > 1 else ''} left out: drawing takes {least} and the budget is "
            f"{time_text(self.settings.seconds)}: give more with --budget, or time ar, connector, dit and "
            "vae too, of which it is composed"
        )

    # Ops and switches

    def ops(self) -> None:
        from blip3o_rt.measure.bench.ops import time_ops

        time_ops(self.config, self.subject.device, self.settings, self.record, self.say)

    def ablations(self) -> None:
        from blip3o_rt.measure.bench.ablation import time_switches

        time_switches(self.subject, self.settings, self.record, self.say)


def image_line(batch: int) -> Line:
    """The line of whole pictures, with nobody on it yet."""
    pictures = "a picture" if batch == 1 else f"{batch} pictures"
    return Line("image", f"{pictures} from words to pixels", per=batch, batch=batch)


def spoken(line: Line, timings: Sequence[Timing]) -> str:
    """A line's result in one line of text."""
    found = []
    for entry, timing in zip(line.entries, timings, strict=True):
        who = entry.contender.who
        if timing.error is not None:
            found.append(f"{who} failed ({describe(timing.error)})")
        elif timing.samples:
            found.append(f"{who} {time_text(median(timing.samples))} (n={len(timing.samples)})")
    batch = f" x{line.batch}" if line.batch > 1 else ""
    return f"{line.name}{batch}: {', '.join(found) or 'nothing measured'}"


def free_memory(device: torch.device) -> None:
    """Give back what no line holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
