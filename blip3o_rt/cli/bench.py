"""blip3o-rt bench: how fast every stage is, beside its baselines and the machine's rooflines; and compare."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from blip3o_rt.cli import bench_serve, bench_windows, options
from blip3o_rt.cli.options import add_options, flag, number, option, pathname

SUMMARY = "time every stage, op and switch beside baselines and rooflines"
DESCRIPTION = (
    "Time every stage of the model beside its baselines: on the same weights and inputs, in turns, in one "
    "process, with the machine's rooflines measured first. Writes bench.json (and bench.html) into --out."
)


class Retired(argparse.Action):
    """--budget, which is accepted for one more release and has no effect."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        text = "is deprecated and ignored: choose --lines and --runs"
        print(f"blip3o-rt: {option} {text}", file=sys.stderr)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    add_options(
        parser.add_argument_group("model"),
        options.MEASURED,
        options.DIFFUSION,
        options.TA_TOK,
        *options.COMPUTING,
        pathname("--work", "DIR", "keep converted checkpoints here (user's cache)"),
    )
    some = {"metavar": "NAMES", "nargs": "?", "const": "all"}
    renamed = {"metavar": "NAMES", "action": options.Renamed}
    lines = (
        "all, or some of ar, connector, tatok, dit, vae, image or whole names as ar.token (all but image; "
        "with --ops or --ablate none)"
    )
    baselines = "transformers, diffusers, published, compiled, graphed, fp32, or none (the first three)"
    add_options(
        parser.add_argument_group("what is measured"),
        option("--lines", "--stages", help=lines, **renamed),
        option("--batch", default="1", metavar="N,N", help="images at a time: tokens, images (1)"),
        option("--baselines", "--peers", help=baselines, **renamed),
        option("--ops", help="every implementation of these ops (of all)", **some),
        pathname("--kernel", "FILE", "a kernel of your own", action="append", default=[]),
        option("--ablate", help="every switch of these lines, off against on (of all)", **some),
    )
    add_options(
        parser.add_argument_group("effort"),
        number("--runs", "N", "rounds of a line (10)"),
        option("--budget", action=Retired, metavar="MINUTES", help=argparse.SUPPRESS),
        flag("--quick", "see that it works: numbers mean nothing"),
    )
    traced = "then trace a call of every stage of ours for ui.perfetto.dev, a .json or .json.gz"
    add_options(
        parser,
        pathname("--trace", "FILE", traced),
        pathname("--out", "DIR", "folder of the record (out/bench-DATE-TIME)"),
        flag("--quiet", "no table and no lines on the way"),
    )
    commands = parser.add_subparsers(title="or", metavar="compare | serve | windows")
    summary = "what became faster or slower from record A to record B, beyond noise"
    compare = commands.add_parser("compare", help=summary, description=f"Say {summary}.")
    slower = "exit code 1 where a line of ours is surely slower by more than this"
    add_options(
        compare,
        pathname("before", "A.json"),
        pathname("after", "B.json"),
        number("--fail-slower", "PERCENT", slower, kind=float),
        flag("--force", "even of different machines or models"),
        flag("--json", "print the verdicts as JSON"),
    )
    compare.set_defaults(run=_compare)
    options.add_command(commands, "serve", bench_serve)
    options.add_command(commands, "windows", bench_windows)


def run(arguments: argparse.Namespace) -> int:
    """Measure; returns the exit code."""
    from blip3o_rt.measure.bench import command  # not for --help: PyTorch takes seconds to import

    return command.run(arguments)


def _compare(arguments: argparse.Namespace) -> int:
    from blip3o_rt.measure.bench.command import compare

    return compare(arguments)
