"""A whole run: rooflines, then stage lines beside their baselines, ops and ablations, into one record."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from blip3o_rt import ops
from blip3o_rt.ar.kv_cache import DEFAULT_PAGE_SIZE
from blip3o_rt.checkpoint.load import Checkpoint
from blip3o_rt.errors import Blip3oError
from blip3o_rt.graphs import DEPENDENT_VARIABLE, graphs_wanted
from blip3o_rt.machine import exact_arithmetic
from blip3o_rt.measure.bench import baselines, compose, rooflines
from blip3o_rt.measure.bench.ablation import ablate
from blip3o_rt.measure.bench.count import kernel_launches, operator_calls
from blip3o_rt.measure.bench.lines import BY_NAME, LINES, Case, Settings
from blip3o_rt.measure.bench.ops import time_ops
from blip3o_rt.measure.bench.stages import STEPS, ArStage, ImageStage
from blip3o_rt.measure.bench.subject import Subject
from blip3o_rt.measure.bench.timing import Candidate, Timing, quiet, race
from blip3o_rt.measure.records import OURS, BenchRecord, Line, describe
from blip3o_rt.measure.units import time_text
from blip3o_rt.ops import native
from blip3o_rt.ops.registry import ENVIRONMENT_VARIABLE
from blip3o_rt.ops.user_kernels import UserKernel
from blip3o_rt.precision import FP32, precision_of

MORE_RUNS = {"ar.token": 4}  # a line of short calls takes more rounds where each is one call
COUNTED_SECONDS = 5.0  # a call that takes longer is not repeated only to count its launches


def model_entry(subject: Subject, tier: str, kernels: Sequence[UserKernel]) -> dict[str, Any]:
    """The record's "model": what was measured, and every switch that was set."""
    precision = subject.precision
    chosen = {
        c.op: c.implementation
        for c in ops.choices(subject.device.type, precision.arithmetic, precision.weights)
        if c.chosen
    }
    return {
        "size": subject.size,
        "dtype": precision.name,
        "tier": tier,
        "device": str(subject.device),
        "threads": torch.get_num_threads(),
        "tokens_per_image": subject.config().image_tokens.tokens_per_image,
        "steps": STEPS,
        "switches": {
            "ops": chosen,
            ENVIRONMENT_VARIABLE: os.environ.get(ENVIRONMENT_VARIABLE),
            "graphs": "on" if graphs_wanted() else "off",
            DEPENDENT_VARIABLE: os.environ.get(DEPENDENT_VARIABLE),
            native.ISA_VARIABLE: os.environ.get(native.ISA_VARIABLE),
            "kernels": [f"{kernel.op}={kernel.implementation}" for kernel in kernels],
            "image_tokens_only": True,
            "kv_page_size": DEFAULT_PAGE_SIZE,
            **subject.switches,
        },
    }


class Run:
    """One run; `log` is given a line of text as soon as something is measured."""

    def __init__(
        self, subject: Subject, settings: Settings, record: BenchRecord, log: Callable[[str], None]
    ) -> None:
        self.subject, self.settings, self.record, self.log = subject, settings, record, log
        self.dtype = precision_of(subject.precision.arithmetic).name

    def everything(self) -> None:
        """All that the settings ask for. What was measured before an interruption is in the record."""
        settings = self.settings
        with exact_arithmetic(self.subject.device):
            self.rooflines()
            self.stages()
            self.images()
            if settings.op_names is not None:
                time_ops(self.subject, settings, self.record, self.log)
            if settings.ablate:
                ablate(self.subject, settings.ablate, settings.runs, self.record, self.log)
        self.record.finish()

    def rooflines(self) -> None:
        self.record.rooflines = rooflines.measure(self.subject.device, quick=self.settings.quick)
        if self.settings.quick:
            self.record.note("quick: the rooflines are too small to mean anything")
        self.record.save()
        found = (f"{r.key} {r.value or 0:.1f} {r.unit}" for r in self.record.rooflines)
        self.log(", ".join(found))

    def stages(self) -> None:
        """The stage lines, with one part in memory at a time; a part that cannot be had leaves a note."""
        chosen = [spec for spec in LINES if spec.cases is not None and spec.name in self.settings.lines]
        for cases, part in dict.fromkeys((spec.cases, spec.part) for spec in chosen):
            assert cases is not None
            try:
                float32 = self.float32([part] if part else None)
                for case in cases(self.subject.load([part] if part else None), self.settings):
                    self.case(case if float32 is None else with_float32(case, float32))
            except Blip3oError as error:
                names = [spec.name for spec in chosen if spec.cases is cases]
                self.note(f"{', '.join(names)} left out: {error}")
            free_memory(self.subject.device)

    def float32(self, parts: Sequence[str] | None) -> Checkpoint | None:
        """The same parts in float32, where that baseline is asked for and is another than ours."""
        if baselines.FLOAT32 not in self.settings.baselines or self.subject.precision == FP32:
            return None
        return replace(self.subject, precision=FP32).load(parts)

    def note(self, text: str) -> None:
        self.record.note(text)
        self.log(text)

    def case(self, case: Case, runs: int | None = None) -> list[Timing]:
        """Race the case's candidates and record each, even if interrupted."""
        on_gpu = self.subject.device.type == "cuda"
        if runs is None:
            runs = self.settings.runs * (1 if on_gpu else MORE_RUNS.get(case.name, 1))
        timings = [Timing() for _ in case.candidates]
        counts: list[dict[str, int]] = [{} for _ in case.candidates]
        try:
            race(case.candidates, timings, self.subject.device, runs)
            counts = [self.count(*pair) for pair in zip(case.candidates, timings, strict=True)]
        finally:
            for candidate, timing, count in zip(case.candidates, timings, counts, strict=True):
                if timing.cold is not None or timing.error is not None:
                    self.add(case, candidate.who, timing, count)
            self.log(summary(case, timings))
        return timings

    def add(self, case: Case, who: str, timing: Timing, count: dict[str, int] | None = None) -> None:
        """A candidate's line; one that failed says why in its note.

        Only ours counts as a failure of the run: a baseline that cannot run here is a fact like its time.
        """
        note = case.notes.get(who)
        if timing.error is not None:
            self.record.failures += who == OURS
            note = "; ".join(filter(None, [note, f"failed: {describe(timing.error)}"]))
        line = Line(
            name=case.name,
            what=case.what,
            who=who,
            batch=case.batch,
            per=case.per,
            samples=tuple(timing.samples),
            cold=timing.cold,
            host=timing.host,
            peak_memory=timing.peak_memory,
            note=note,
        )
        for key, value in (count or {}).items():
            setattr(line, key, value)
        work = case.work.get(who)
        if work is not None:
            line.bytes, line.flops = work.bytes, work.flops
            bound = self.record.bound(work.bytes, work.flops, self.dtype)
            if bound is not None and line.median is not None:
                line.roofline, line.utilization = bound[0], bound[1] / line.median
        self.record.add(line)

    def count(self, candidate: Candidate, timing: Timing) -> dict[str, int]:
        """Launches of one more call on a GPU, operator calls on the CPU; none of what takes long or fails."""
        on_gpu = self.subject.device.type == "cuda"
        uncountable = not on_gpu and candidate.who in baselines.WHO.values()  # nothing but compiled code
        if not timing.samples or uncountable or min(timing.samples) > COUNTED_SECONDS:
            return {}
        with quiet():
            candidate.prepare()
            if on_gpu:
                return {"launches": kernel_launches(candidate.call)}
            return {"operator_calls": operator_calls(candidate.call)}

    # Whole images

    def images(self) -> None:
        """Images end to end where they are asked for; else composed, where all stages were timed."""
        lines = self.settings.lines
        if not lines.intersection(("image", "image.host")):
            for batch in self.settings.batches:
                self.compose(batch)
            return
        checkpoint = self.subject.load()
        stage = ImageStage(checkpoint, max_batch=max(self.settings.batches), steps=self.settings.steps)
        prompt = ArStage.prompt(checkpoint)
        modes: dict[str, str | None] = {"published": None} if "published" in self.settings.baselines else {}
        others = {
            who: baselines.ImageBaseline(checkpoint, prompt, mode, self.settings.steps)
            for who, mode in (modes | dict(self.settings.compiled())).items()
        }
        for batch in self.settings.batches:
            case = image_case(batch)
            case.add(OURS, partial(stage.draw, batch))
            case.candidates[0].eager = True  # a request is timed with its host
            for who, baseline in others.items():
                case.add(who, partial(baseline.draw, batch))
            self.image(case, stage)
        del stage, others, checkpoint
        free_memory(self.subject.device)

    def image(self, case: Case, stage: ImageStage) -> None:
        """Draw one case's images, and record what of ours none of its stages accounts for."""
        timings: list[Timing] = []
        try:
            timings = self.case(case)
        finally:
            count = len(timings[0].samples) if timings else 0
            warm = stage.host.get(case.batch, [])[1 : 1 + count]
            if "image.host" in self.settings.lines and warm:
                host = Case("image.host", "end to end minus its stages", case.per, case.batch)
                self.add(host, OURS, Timing(samples=warm))

    def compose(self, batch: int) -> None:
        """Everybody's image from the medians of its stages."""
        tokens, case = self.subject.config().image_tokens.tokens_per_image, image_case(batch)
        chosen = ["published"] if "published" in self.settings.baselines else []
        chosen += [who for who, _ in self.settings.compiled()]
        timings = []
        for who, parts in compose.recipes(tokens, self.settings.steps, batch, chosen).items():
            seconds = compose.composed(parts, self.record.lines)
            if seconds is not None:
                case.add(who, lambda: None, note=compose.note(parts))
                timings.append(Timing(samples=[seconds]))
                self.add(case, who, timings[-1])
        if timings:
            self.log(summary(case, timings) + " (composed)")


def with_float32(case: Case, checkpoint: Checkpoint) -> Case:
    """The case with our candidate on a float32 checkpoint beside it, where a line has one of its own."""
    ours = BY_NAME[case.name].ours
    if ours is not None and case.batch == 1:
        candidate = ours(checkpoint)
        case.add(baselines.FLOAT32, candidate.call, prepare=candidate.prepare, queued=candidate.queued)
    return case


def image_case(batch: int) -> Case:
    """Whole images, with no candidate yet."""
    images = "an image" if batch == 1 else f"{batch} images"
    return Case("image", f"{images} from words to pixels", per=batch, batch=batch)


def summary(case: Case, timings: Sequence[Timing]) -> str:
    """A case's result in one line of text."""
    found = []
    for candidate, timing in zip(case.candidates, timings, strict=True):
        if timing.error is not None:
            found.append(f"{candidate.who} failed ({describe(timing.error)})")
        elif timing.samples:
            median = Line(samples=tuple(timing.samples)).median
            found.append(f"{candidate.who} {time_text(median)} (n={len(timing.samples)})")
    label = Line(name=case.name, batch=case.batch).label
    return f"{label}: {', '.join(found) or 'nothing measured'}"


def free_memory(device: torch.device) -> None:
    """Give back what no line holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
