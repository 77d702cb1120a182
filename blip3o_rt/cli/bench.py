"""blip3o-rt bench: how fast every stage is, beside its baselines and the machine's rooflines; and compare."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from blip3o_rt.cli import bench_serve, bench_windows
from blip3o_rt.cli.options import (
    DEVICE,
    DIFFUSION,
    DTYPE,
    MEASURED,
    SWITCH,
    TA_TOK,
    TIER,
    Renamed,
    add_options,
)

DESCRIPTION = (
    "Time every stage of the model beside its baselines: on the same weights and inputs, in turns, in one "
    "process, with the machine's rooflines measured first. Writes bench.json (and bench.html) into --out."
)


class Retired(argparse.Action):
    """--budget, which is accepted for one more release and has no effect."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        text = "is deprecated and ignored: choose --lines and --runs"
        print(f"blip3o-rt: {option} {text}", file=sys.stderr)


def add_parser(subparsers: Any) -> None:
    """Add the command's parser to the result of ArgumentParser.add_subparsers."""
    summary = "time every stage, op and switch beside baselines and rooflines"
    parser: argparse.ArgumentParser = subparsers.add_parser("bench", help=summary, description=DESCRIPTION)
    model = parser.add_argument_group("model")
    add_options(model, MEASURED, DIFFUSION, TA_TOK, DTYPE, DEVICE, TIER, SWITCH)
    model.add_argument(
        "--work", type=Path, metavar="DIR", help="keep converted checkpoints here (user's cache)"
    )
    what = parser.add_argument_group("what is measured")
    what.add_argument(
        "--lines",
        "--stages",
        dest="lines",
        action=Renamed,
        metavar="NAMES",
        help="all, or some of ar, connector, tatok, dit, vae, image or whole names as ar.token (all but "
        "image; with --ops or --ablate none)",
    )
    what.add_argument("--batch", default="1", metavar="N,N", help="images at a time: tokens, images (1)")
    what.add_argument(
        "--baselines",
        "--peers",
        dest="baselines",
        action=Renamed,
        metavar="NAMES",
        help="transformers, diffusers, published, compiled, graphed, fp32, or none (the first three)",
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
    effort.add_argument("--runs", type=int, metavar="N", help="rounds of a line (10)")
    effort.add_argument("--budget", action=Retired, metavar="MINUTES", help=argparse.SUPPRESS)
    effort.add_argument("--quick", action="store_true", help="see that it works: numbers mean nothing")
    parser.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="then trace a call of every stage of ours for ui.perfetto.dev, a .json or .json.gz",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the record (out/bench-DATE-TIME)")
    parser.add_argument("--quiet", action="store_true", help="no table and no lines on the way")
    parser.set_defaults(run=_run)
    _add_compare(parser)


def _add_compare(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(title="or", metavar="compare | serve | windows")
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
    compare.set_defaults(run=_compare)
    bench_serve.add_parser(commands)
    bench_windows.add_parser(commands)


def _run(arguments: argparse.Namespace) -> int:
    from blip3o_rt.measure.bench.command import run  # not for --help: PyTorch takes seconds to import

    return run(arguments)


def _compare(arguments: argparse.Namespace) -> int:
    from blip3o_rt.measure.bench.command import compare

    return compare(arguments)
