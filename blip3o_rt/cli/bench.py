"""blip3o-rt bench: how fast every stage is, beside its peers and the machine's ceilings; and compare."""

from __future__ import annotations

import argparse
import json
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blip3o_rt import trace
from blip3o_rt.cli import bench_serve
from blip3o_rt.cli.options import DEVICE, DIFFUSION, DTYPE, SWITCH, TA_TOK, TIER, add_options
from blip3o_rt.cli.outputs import make_folder
from blip3o_rt.errors import ParameterError
from blip3o_rt.switches import check_tier, parse_switches

if TYPE_CHECKING:
    from blip3o_rt.measure.bench.record import Record

DESCRIPTION = (
    "Time every stage of the model beside its peers: on the same weights and inputs, in turns, in one "
    "process, with the machine's ceilings measured first. Writes bench.json (and bench.html) into --out."
)
FAILED_LINES = 1
BUDGET_MINUTES = {"published": 20.0, "shapes": 4.0, "tiny": 1.0}  # of others: as published
QUICK_MINUTES = 0.5
RUNS, QUICK_RUNS = 10, 2
MAX_RUNS, MAX_BATCH = 10_000, 256


def add_parser(subparsers: Any) -> None:
    """Add the command's parser to the result of ArgumentParser.add_subparsers."""
    summary = "time every stage, op and switch beside peers and ceilings"
    parser: argparse.ArgumentParser = subparsers.add_parser("bench", help=summary, description=DESCRIPTION)
    model = parser.add_argument_group("model")
    model.add_argument(
        "--size",
        default="shapes",
        metavar="SIZE",
        help="published or tiny (random weights), shapes (the embedded model), or a checkpoint's folder "
        "(%(default)s)",
    )
    add_options(model, DIFFUSION, TA_TOK, DTYPE, DEVICE, TIER, SWITCH)
    model.add_argument(
        "--work",
        type=Path,
        metavar="DIR",
        help="keep checkpoints here (published: 18 GB in bf16; user's cache)",
    )
    what = parser.add_argument_group("what is measured")
    what.add_argument(
        "--stages",
        metavar="NAMES",
        help="all, or some of ar, connector, tatok, dit, vae, image or whole names as ar.token (all; with "
        "--ops or --ablate none)",
    )
    what.add_argument("--batch", default="1", metavar="N,N", help="pictures at a time: tokens, images (1)")
    what.add_argument(
        "--peers",
        metavar="NAMES",
        help="transformers, diffusers, published, compiled, graphed, or none (the first three)",
    )
    what.add_argument(
        "--ops", nargs="?", const="all", metavar="NAMES", help="every implementation of these ops (of all)"
    )
    what.add_argument(
        "--kernel", type=Path, action="append", default=[], metavar="FILE", help="a kernel of your own"
    )
    what.add_argument(
        "--ablate",
        nargs="?",
        const="all",
        metavar="NAMES",
        help="every switch of these lines, off against on (of all)",
    )
    effort = parser.add_argument_group("effort")
    effort.add_argument("--runs", type=int, metavar="N", help=f"rounds of a line at most ({RUNS})")
    effort.add_argument(
        "--budget", type=float, metavar="MINUTES", help="of all stages (published 20, shapes 4, tiny 1)"
    )
    effort.add_argument("--quick", action="store_true", help="see that it works: numbers mean nothing")
    parser.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="then trace a call of every stage of ours for ui.perfetto.dev, a .json or .json.gz",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the record (out/bench-DATE-TIME)")
    parser.add_argument("--quiet", action="store_true", help="no table and no lines on the way")
    parser.set_defaults(run=run)
    _add_compare(parser)


def _add_compare(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(title="or", metavar="compare | serve")
    summary = "what became faster or slower from record A to record B, beyond noise"
    compare = commands.add_parser("compare", help=summary, description=f"Say {summary}.")
    compare.add_argument("before", type=Path, metavar="A.json")
    compare.add_argument("after", type=Path, metavar="B.json")
    compare.add_argument(
        "--fail-slower",
        type=float,
        metavar="PERCENT",
        help="exit code 1 where a line of ours is surely slower by more than this",
    )
    compare.add_argument("--force", action="store_true", help="even of different machines or models")
    compare.add_argument("--json", action="store_true", help="print the verdicts as JSON")
    compare.set_defaults(run=run_compare)
    bench_serve.add_parser(commands)


def run(arguments: argparse.Namespace) -> int:
    """Measure and write the record; 0 done, 1 where a line of ours failed or an op was wrong."""
    batches = parse_batches(arguments.batch)
    runs, minutes = effort(arguments)
    check_tier(arguments.tier, parse_switches(arguments.switch))
    out = arguments.out or Path("out") / f"bench-{datetime.now():%Y%m%d-%H%M%S}"
    if out.exists() and not out.is_dir():
        raise ParameterError(f"--out is {out}, a file: accepted is a folder")
    if arguments.trace is not None:
        trace.check_path(arguments.trace)
        make_folder("--trace", arguments.trace.parent)

    # PyTorch takes seconds to import: not for --help
    from transformers.utils import logging

    from blip3o_rt.machine import resolve_device, resolve_dtype
    from blip3o_rt.measure.bench import ablation, lines
    from blip3o_rt.measure.bench.record import Record
    from blip3o_rt.measure.bench.run import Run, Settings, model_entry
    from blip3o_rt.measure.bench.subject import prepare
    from blip3o_rt.measure.bench.traced import trace_stages
    from blip3o_rt.measure.validate.checkpoint import default_work_folder
    from blip3o_rt.ops.user_kernels import load_kernels

    logging.set_verbosity_error()
    device = resolve_device(arguments.device)
    dtype = resolve_dtype(arguments.dtype, device)
    switches = check_tier(arguments.tier, parse_switches(arguments.switch), device.type)
    wanted = names(arguments.stages) or (() if arguments.ops or arguments.ablate else ("all",))
    stages = lines.select(wanted)
    op_names = parse_ops(arguments.ops)
    peer_names, notes = choose_peers(arguments.peers, stages, device)
    settings = Settings(
        arguments.tier,
        batches,
        stages,
        peer_names,
        op_names,
        ablation.select(names(arguments.ablate)),
        runs,
        60 * minutes,
        arguments.quick,
    )
    with load_kernels(arguments.kernel) as kernels:
        say = (lambda text: None) if arguments.quiet else _say
        subject = prepare(
            arguments.size,
            dtype,
            device,
            arguments.work or default_work_folder(),
            say,
            switches,
            diffusion=arguments.diffusion,
            ta_tok=arguments.ta_tok,
        )
        record = Record(out, command_line(), model_entry(subject, arguments.tier, kernels))
        for note in notes:
            record.note(note)
        for note in notes:
            say(note)
        try:
            Run(subject, settings, record, say).everything()
        finally:
            finish(record, quiet=arguments.quiet)
        if arguments.trace is not None:
            trace_stages(subject, stages, arguments.trace, say)
            print(arguments.trace)
    return FAILED_LINES if record.failed else 0


def effort(arguments: argparse.Namespace) -> tuple[int, float]:
    """Rounds and minutes. Raises ParameterError."""
    runs = arguments.runs if arguments.runs is not None else QUICK_RUNS if arguments.quick else RUNS
    if not 1 <= runs <= MAX_RUNS:
        raise ParameterError(f"runs is {runs}: accepted is 1 to {MAX_RUNS}")
    usual = BUDGET_MINUTES.get(arguments.size, BUDGET_MINUTES["published"])
    minutes = arguments.budget
    if minutes is None:
        minutes = QUICK_MINUTES if arguments.quick else usual
    if not 0 <= minutes < float("inf"):
        raise ParameterError(f"budget is {minutes:g} minutes: accepted is a number from 0 on")
    return runs, minutes


def names(text: str | None) -> tuple[str, ...]:
    """The names in a list with commas."""
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())


def parse_batches(text: str) -> tuple[int, ...]:
    """Batch sizes in a list with commas. Raises ParameterError."""
    found = names(text)
    if not found or not all(name.isdecimal() and 1 <= int(name) <= MAX_BATCH for name in found):
        raise ParameterError(f"batch is {text!r}: accepted are numbers from 1 to {MAX_BATCH}, as 1,2,4")
    return tuple(dict.fromkeys(int(name) for name in found))


def parse_ops(text: str | None) -> tuple[str, ...] | None:
    """Names of ops, all of them for "all"; None for none. Raises OpError for an unknown one."""
    from blip3o_rt import ops
    from blip3o_rt.ops.registry import find

    if text is None:
        return None
    return tuple(sorted(ops.all_ops())) if text == "all" else tuple(find(name).name for name in names(text))


def choose_peers(text: str | None, stages: frozenset[str], device: Any) -> tuple[tuple[str, ...], list[str]]:
    """Peers that can run here, and why others cannot. Raises ParameterError for an unknown one."""
    from blip3o_rt.measure.bench import peers

    if text == "none" or not stages:
        return (), []
    return peers.available(names(text) if text else peers.DEFAULT_PEERS, device)


def command_line() -> list[str]:
    """This command as it was given."""
    return ["blip3o-rt", *sys.argv[1:]]


def finish(record: Record, *, quiet: bool) -> None:
    """Print the table and the paths, whether the run came to its end or not."""
    from blip3o_rt.measure.bench.table import as_text

    if not quiet:
        print(as_text(record.data))
    print(record.path)
    page = write_page(record)
    if page is not None:
        print(page)


def write_page(record: Record) -> Path | None:
    """The record as a page beside it; None where it cannot be made, which is said and no failure."""
    path = record.path.with_suffix(".html")
    try:
        from blip3o_rt.measure.reports import bench_html

        bench_html(record.data, path)
    except ImportError as error:
        print(f"blip3o-rt: no page ({error}): pip install 'blip3o_rt[bench]'", file=sys.stderr)
        return None
    return path


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run_compare(arguments: argparse.Namespace) -> int:
    """Print the verdicts; 1 where --fail-slower says so."""
    from blip3o_rt.measure.bench import compare

    verdicts = compare.compare_files(arguments.before, arguments.after, force=arguments.force)
    if arguments.json:
        print(json.dumps([verdict.to_dict() for verdict in verdicts], indent=2))
    else:
        print(compare.as_text(verdicts))
    if arguments.fail_slower is None:
        return 0
    return FAILED_LINES if compare.slower_than(verdicts, arguments.fail_slower) else 0
