"""What `blip3o-rt bench` does with its arguments (see cli/bench.py)."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import torch
from transformers.utils import logging

from blip3o_rt import ops, trace
from blip3o_rt.cli.outputs import make_folder
from blip3o_rt.errors import ParameterError
from blip3o_rt.machine import resolve_device
from blip3o_rt.measure import tables
from blip3o_rt.measure.bench import baselines, lines
from blip3o_rt.measure.bench import compare as comparing
from blip3o_rt.measure.bench.run import Run, model_entry
from blip3o_rt.measure.bench.subject import prepare
from blip3o_rt.measure.bench.traced import trace_stages
from blip3o_rt.measure.records import BenchRecord
from blip3o_rt.measure.validate.checkpoint import default_work_folder
from blip3o_rt.ops.registry import find
from blip3o_rt.ops.user_kernels import load_kernels
from blip3o_rt.precision import resolve_precision
from blip3o_rt.switches import check_tier, parse_switches

FILE = "bench.json"
FAILED_LINES = 1
RUNS, QUICK_RUNS = 10, 2
MAX_RUNS, MAX_BATCH = 10_000, 256


def run(arguments: argparse.Namespace) -> int:
    """Measure and write the record; 0 done, 1 where a line of ours failed or an op was wrong."""
    out = arguments.out or Path("out") / f"bench-{datetime.now():%Y%m%d-%H%M%S}"
    if out.exists() and not out.is_dir():
        raise ParameterError(f"--out is {out}, a file: accepted is a folder")
    device = resolve_device(arguments.device)
    switches = check_tier(arguments.tier, parse_switches(arguments.switch), device.type)
    settings, notes = read_settings(arguments, device)
    if arguments.trace is not None:
        trace.check_path(arguments.trace)
        make_folder("--trace", arguments.trace.parent)
    logging.set_verbosity_error()
    log: Callable[[str], None] = (lambda text: None) if arguments.quiet else _log
    with load_kernels(arguments.kernel) as kernels:
        subject = prepare(
            arguments.model,
            resolve_precision(arguments.dtype, device),
            device,
            arguments.work or default_work_folder(),
            switches,
            diffusion=arguments.diffusion,
            ta_tok=arguments.ta_tok,
        )
        command = ["blip3o-rt", *sys.argv[1:]]
        record = BenchRecord.begin(out / FILE, command, model_entry(subject, arguments.tier, kernels))
        for note in notes:
            record.note(note)
            log(note)
        try:
            Run(subject, settings, record, log).everything()
        finally:
            finish(record, quiet=arguments.quiet)
        if arguments.trace is not None:
            trace_stages(subject, settings.lines, arguments.trace, log)
            print(arguments.trace)
    return FAILED_LINES if record.failed else 0


def read_settings(arguments: argparse.Namespace, device: torch.device) -> tuple[lines.Settings, list[str]]:
    """What is measured, and why baselines are left out. Raises ParameterError and OpError."""
    runs = arguments.runs if arguments.runs is not None else QUICK_RUNS if arguments.quick else RUNS
    if not 1 <= runs <= MAX_RUNS:
        raise ParameterError(f"runs is {runs}: accepted is 1 to {MAX_RUNS}")
    nothing_else = not (arguments.ops or arguments.ablate)
    chosen = lines.select(names(arguments.lines) or (lines.STAGES if nothing_else else ()))
    wanted = names(arguments.baselines) or baselines.DEFAULT_BASELINES
    if arguments.baselines == "none" or not chosen:
        wanted = ()
    wanted, notes = baselines.available(wanted, device)
    op_names = None
    if arguments.ops is not None:
        every = arguments.ops == "all"
        op_names = tuple(sorted(ops.all_ops()) if every else (find(n).name for n in names(arguments.ops)))
    settings = lines.Settings(
        tier=arguments.tier,
        batches=parse_batches(arguments.batch),
        lines=chosen,
        baselines=wanted,
        op_names=op_names,
        ablate=lines.select(names(arguments.ablate), known=lines.ABLATED, option="ablate"),
        runs=runs,
        quick=arguments.quick,
    )
    return settings, notes


def names(text: str | None) -> tuple[str, ...]:
    """The names in a list with commas."""
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())


def parse_batches(text: str) -> tuple[int, ...]:
    """Batch sizes in a list with commas. Raises ParameterError."""
    found = names(text)
    if not found or not all(name.isdecimal() and 1 <= int(name) <= MAX_BATCH for name in found):
        raise ParameterError(f"batch is {text!r}: accepted are numbers from 1 to {MAX_BATCH}, as 1,2,4")
    return tuple(dict.fromkeys(int(name) for name in found))


def finish(record: BenchRecord, *, quiet: bool) -> None:
    """Print the table and the paths, whether the run came to its end or not."""
    if not quiet:
        print(tables.as_text(record))
    print(record.path)
    assert record.path is not None
    page = record.path.with_suffix(".html")
    try:
        from blip3o_rt.measure.reports import bench_html

        bench_html(record, page)
    except ImportError as error:  # no failure: the record is there
        print(f"blip3o-rt: no page ({error}): pip install 'blip3o_rt[bench]'", file=sys.stderr)
    else:
        print(page)


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def compare(arguments: argparse.Namespace) -> int:
    """Print the verdicts; 1 where --fail-slower says so."""
    verdicts = comparing.compare_files(arguments.before, arguments.after, force=arguments.force)
    if arguments.json:
        print(json.dumps([verdict.to_dict() for verdict in verdicts], indent=2))
    else:
        print(comparing.as_text(verdicts))
    if arguments.fail_slower is None:
        return 0
    return FAILED_LINES if comparing.slower_than(verdicts, arguments.fail_slower) else 0
