"""blip3o-rt bench windows: what several tokens a pass bring to a checkpoint on this machine."""

from __future__ import annotations

import argparse
import sys

from blip3o_rt.cli import drawing, options
from blip3o_rt.cli.options import add_options, count, flag, option, pathname
from blip3o_rt.cli.outputs import check_file, make_folder
from blip3o_rt.params import AUTO, SamplingParams, check_draft_window

SUMMARY = "tokens a pass and time of an image by draft_window, and of a pass by its rows"
DESCRIPTION = f"Measure {SUMMARY}. Stops if an image depends on its window."
PROMPTS = ("a large red circle on a blue background", "a small green star beside a yellow square")
WINDOWS = f"1,2,4,8,16,{AUTO}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    add_options(
        parser,
        option("--prompt", action="append", metavar="TEXT", help="again for another (two of shapes)"),
        option("--windows", default=WINDOWS, metavar="N,N,..", help="(%(default)s)"),
        count("--rounds", "N", "images per prompt", 5),
        flag("--passes-only", "no images: only what a pass costs by its rows"),
        pathname("--out", "FILE.json", "write the numbers too"),
    )
    add_options(parser.add_argument_group("model"), *options.MODEL, *options.SIZES)


def run(arguments: argparse.Namespace) -> int:
    """Measure and print."""
    windows = [int(text) if text.isdigit() else text for text in arguments.windows.split(",")]
    for window in windows:
        check_draft_window(window)
    if arguments.out is not None:
        check_file("--out", arguments.out)
        make_folder("--out", arguments.out.parent)
    pipeline = drawing.load_pipeline(arguments)
    from blip3o_rt.measure.bench import windows as measured
    from blip3o_rt.measure.provenance import model_record, record_head, write_record

    prompts = arguments.prompt or list(PROMPTS)
    found = []
    if not arguments.passes_only:
        found = measured.window_times(pipeline, prompts, windows, SamplingParams(), arguments.rounds, _say)
    passes = measured.pass_times(pipeline, prompts[0], arguments.rounds)
    tables = measured.as_dict(found, passes)
    print(measured.as_text(tables))
    if arguments.out is not None:
        head = record_head("windows", ["blip3o-rt", *sys.argv[1:]])
        model = model_record(pipeline, arguments.model)
        write_record(arguments.out, {**head, "model": model, **tables, "complete": True})
        print(arguments.out)
    return 0


def _say(line: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{line}\033[K", end="", file=sys.stderr)
