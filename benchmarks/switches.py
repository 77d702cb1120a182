"""What every switch of the fast tier costs and saves: the shapes score, likeness to tier exact, and time.

    python -m benchmarks.switches --out benchmarks/results/MACHINE/switches
    python -m benchmarks.switches --render     write the table of docs/fast-tier.md from the newest records

Every request is drawn by tier exact and by every case in turns, with the same seed, so that all are timed
under the same load. In float32, where two images differ by nothing but the switch. Quantized weights that
only a GPU has kernels for are computed by their definition on a CPU: their likeness, and no time.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.render import RESULTS, ROOT, markdown
from blip3o_rt.checkpoint.load import load_checkpoint
from blip3o_rt.checkpoint.parts import DTYPES, QUANTIZERS
from blip3o_rt.cli import INTERRUPTED
from blip3o_rt.cli.outputs import make_folder
from blip3o_rt.cli.score import few_threads
from blip3o_rt.embedded import embedded_checkpoint
from blip3o_rt.machine import resolve_device
from blip3o_rt.measure.provenance import record_head, write_record
from blip3o_rt.measure.records import median, read_records
from blip3o_rt.measure.shapes.score import Drawn, check_model, draw_and_judge, wilson_interval
from blip3o_rt.measure.shapes.tasks import Task, draw_tasks
from blip3o_rt.measure.units import ratio_text
from blip3o_rt.measure.validate.images import Likeness
from blip3o_rt.params import DiffusionParams
from blip3o_rt.pipeline import Pipeline
from blip3o_rt.switches import (
    AR_WEIGHTS,
    DIT_WEIGHTS,
    EXACT,
    FAST,
    GUIDANCE_INTERVAL,
    SOLVER,
    STEP_CACHE,
    SWITCHES,
    VAE_TILES,
    check_tier,
)

PAGE = ROOT / "docs" / "fast-tier.md"
KIND = "switches"
BEGIN = "<!-- Written by `python -m benchmarks.switches --render` from the records. Do not edit. -->"
END = "<!-- The end of what is written. -->"
STEPS = DiffusionParams().steps
COUNT = 25
WHOLE = "whole image"

# The stage that a switch acts in, and the settings that are measured, each with a number of steps.
STAGES = {
    AR_WEIGHTS: "tokens",
    DIT_WEIGHTS: "denoise",
    GUIDANCE_INTERVAL: "denoise",
    STEP_CACHE: "denoise",
    SOLVER: "denoise",
    VAE_TILES: "decode",
}
SETTINGS: Mapping[str, Sequence[tuple[str, int]]] = {
    AR_WEIGHTS: [("int8", STEPS), ("fp8", STEPS)],
    DIT_WEIGHTS: [("int8", STEPS), ("fp8", STEPS)],
    GUIDANCE_INTERVAL: [("0.1:0.9", STEPS), ("0.2:0.8", STEPS)],
    STEP_CACHE: [("2", STEPS), ("3", STEPS), ("4", STEPS)],
    SOLVER: [("dpm++", STEPS), ("dpm++", 15), ("dpm++", 10)],
    VAE_TILES: [("2", STEPS)],
}
FEWER_STEPS = (15, 10)  # of the exact tier, what a solver or a cache is to be compared with


@dataclass(frozen=True)
class Case:
    """Something to measure: switches, a number of steps, and the stage whose time is compared.

    defined: of switches that the device computes by their definition alone.
    """

    switches: Mapping[str, str]
    steps: int = STEPS
    stage: str = WHOLE
    defined: bool = False

    @property
    def label(self) -> str:
        """What is on, in words."""
        named = ", ".join(f"{name}={setting}" for name, setting in self.switches.items())
        return (named or f"tier {EXACT}") + (" (its definition)" if self.defined else "")


@dataclass
class Measured:
    """What came of a case: its images, and how alike each is to the one of tier exact."""

    case: Case
    drawn: list[Drawn] = field(default_factory=list)
    likeness: list[Likeness] = field(default_factory=list)

    def seconds(self, stage: str) -> list[float]:
        """Of a stage, of every image that was drawn."""
        reports = [one.report for one in self.drawn if one.report is not None]
        return [r.total_seconds if stage == WHOLE else r.stage(stage).seconds for r in reports]

    def entry(self, exact: Measured) -> dict[str, Any]:
        """The record's entry. A PSNR is null where the images are equal."""
        return {
            "switches": dict(self.case.switches),
            "label": self.case.label,
            "steps": self.case.steps,
            "right": sum(one.verdict.right for one in self.drawn),
            "n": len(self.drawn),
            "psnr": [one.psnr if math.isfinite(one.psnr) else None for one in self.likeness],
            "ssim": [one.ssim for one in self.likeness],
            "stage": self.case.stage,
            "seconds": [] if self.case.defined else self.seconds(self.case.stage),
            "seconds_exact": exact.seconds(self.case.stage),
        }


def cases(device_type: str) -> Iterator[Case]:
    """Tier exact first, then with fewer steps, every switch by itself, and what tier fast takes unasked."""
    yield Case({})
    for steps in FEWER_STEPS:
        yield Case({}, steps, "denoise")
    for name, settings in SETTINGS.items():
        for setting, steps in settings:
            runs = SWITCHES[name].runs_on(setting, device_type)
            if runs or (device_type == "cpu" and (name, setting) in QUANTIZERS):
                yield Case({name: setting}, steps, STAGES[name], defined=not runs)
    yield Case(check_tier(FAST, None, device_type))


def measure(
    found: Sequence[Case], tasks: Sequence[Task], model: Path | None, device: str, dtype: str
) -> list[Measured]:
    """Every task by every case in turns; an interrupt ends it, and what is there are whole rounds."""
    pipelines = {}
    for case in found:
        key = tuple(case.switches.items())
        if key not in pipelines:
            pipelines[key] = load(case, model, device, dtype)
            check_model(pipelines[key])
    measured = [Measured(case) for case in found]
    try:
        for task in tqdm(tasks, desc="switches", disable=None):
            drawn = [
                next(draw_and_judge(pipelines[tuple(case.switches.items())], [task], steps=case.steps))
                for case in found
            ]
            alike = [likeness(image, drawn[0]) for image in drawn]
            for one, image, likenesses in zip(measured, drawn, alike, strict=True):
                one.drawn.append(image)
                one.likeness += likenesses
    except KeyboardInterrupt:
        if not measured[0].drawn:
            raise
    return measured


def likeness(image: Drawn, expected: Drawn) -> list[Likeness]:
    """How alike two images are; empty where one of them could not be drawn."""
    if image.image is None or expected.image is None:
        return []
    return [Likeness.of(np.asarray(image.image), np.asarray(expected.image))]


def load(case: Case, model: Path | None, device: str, dtype: str) -> Pipeline:
    """The pipeline of a case."""
    if not case.defined:
        tier = FAST if case.switches else EXACT
        return Pipeline.load(
            model, device=device, dtype=dtype, tier=tier, switches=case.switches, max_batch=1
        )
    exact = load_checkpoint(model or embedded_checkpoint(), device=device, dtype=DTYPES[dtype])
    weights = dict(exact.weights)
    for switch in case.switches.items():
        part, quantized = QUANTIZERS[switch]
        weights[part] = quantized(weights[part].items())
    return Pipeline(replace(exact, weights=weights, switches=case.switches), max_batch=1)


def table(record: Mapping[str, Any]) -> str:
    """A record as the page shows it."""
    headers = [
        "on",
        "steps",
        "right",
        "95% interval",
        "PSNR, median",
        "lowest",
        "SSIM, lowest",
        "faster",
        "of",
    ]
    return markdown((headers, [_row(entry) for entry in record["entries"]]))


def _row(entry: Mapping[str, Any]) -> list[str]:
    low, high = wilson_interval(entry["right"], entry["n"])
    cells = [entry["label"], str(entry["steps"]), f"{entry['right']} of {entry['n']}"]
    cells.append(f"{100 * low:.0f} to {100 * high:.0f}%")
    if not entry["switches"] and entry["steps"] == STEPS:  # compared with itself
        return [*cells, "", "", "", "", ""]
    psnr = [math.inf if value is None else value for value in entry["psnr"]]
    likeness = [_decibels(median(psnr)), _decibels(min(psnr)), f"{min(entry['ssim']):.4f}"]
    if not entry["seconds"]:
        return [*cells, *likeness, "", ""]
    ratio = median(entry["seconds_exact"]) / median(entry["seconds"])
    return [*cells, *likeness, ratio_text(ratio), entry["stage"]]


def _decibels(psnr: float) -> str:
    return f"{psnr:.1f} dB" if math.isfinite(psnr) else "equal"


def rendered(text: str, results: Path = RESULTS) -> str:
    """The page with the tables of the newest record of every machine between its two marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    newest = {_machine(record): record for record in read_records(results, KIND, dict)}
    sections = [
        f"{name}, `{_command(record)}`:\n\n{table(record)}" for name, record in sorted(newest.items())
    ]
    return "\n".join([before + BEGIN, *sections, END + after])


def _machine(record: Mapping[str, Any]) -> str:
    """Where and in what a record was made."""
    machine, model = record["machine"], record["model"]
    name = machine["gpu"] if str(model["device"]).startswith("cuda") else machine["cpu"]
    return f"{name}, {model['dtype']}, threads: {model['threads']}, {model['size']}"


def _command(record: Mapping[str, Any]) -> str:
    return " ".join(map(str, record["command"]))


def main(argv: Sequence[str] | None = None) -> int:
    description, _, details = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, metavar="DIR", help="a model of the shapes (the embedded one)")
    parser.add_argument("--count", type=int, default=COUNT, help="requests of each category (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the requests (%(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (%(default)s)")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"), help="(%(default)s)")
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"where {KIND}.json goes")
    parser.add_argument("--render", action="store_true", help="measure nothing: write the table")
    arguments = parser.parse_args(argv)
    if not arguments.render:
        return run(arguments)
    PAGE.write_text(rendered(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


def run(arguments: argparse.Namespace) -> int:
    """Measure, write the record and print its table."""
    device = resolve_device(arguments.device)
    if arguments.out is not None:
        make_folder("--out", arguments.out)
    words = ["python", "-m", "benchmarks.switches", *sys.argv[1:]]
    head = record_head(KIND, words)
    with few_threads():
        model = {
            "size": "shapes" if arguments.model is None else str(arguments.model),
            "dtype": arguments.dtype,
            "device": str(device),
            "threads": torch.get_num_threads(),
        }
        tasks = draw_tasks(arguments.count, arguments.seed)
        measured = measure(
            list(cases(device.type)), tasks, arguments.model, arguments.device, arguments.dtype
        )
    entries = [one.entry(measured[0]) for one in measured]
    settings = {"count": arguments.count, "seed": arguments.seed}
    complete = len(measured[0].drawn) == len(tasks)
    record = head | {"complete": complete, "model": model, "settings": settings, "entries": entries}
    print(table(record))
    if arguments.out is not None:
        write_record(arguments.out / f"{KIND}.json", record)
        print(arguments.out / f"{KIND}.json")
    return 0 if complete else INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
