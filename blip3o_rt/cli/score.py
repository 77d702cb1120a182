"""blip3o-rt score: how often a model of the shapes draws what it is asked."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from blip3o_rt.cli import drawing, options
from blip3o_rt.cli.options import add_options, flag, number, option, parameter, pathname
from blip3o_rt.cli.outputs import make_folder
from blip3o_rt.errors import ParameterError
from blip3o_rt.params import MAX_SEED, named

if TYPE_CHECKING:
    from blip3o_rt.measure.shapes.score import Drawn
    from blip3o_rt.pipeline import Pipeline

SUMMARY = "measure how often the shapes model draws what it is asked"
DESCRIPTION = (
    "Draw captions and edits with a model of the shapes, judge the images by their pixels, and print the "
    "accuracy by category and by property with 95% confidence intervals. Edits of images that somebody else "
    "drew, the foreign world, are judged by hue and outline."
)
MAX_COUNT = 10_000
UNDER_THE_BAR = 1
WORLDS = ("both", "own", "foreign")
RECORD, SHEET = "score.json", "score.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    worlds = "which images are edited: the model's own, foreign ones, or both (%(default)s)"
    add_options(
        parser.add_argument_group("tasks"),
        number("--count", "N", "images of each category: held out, single, two, edit; foreign edit", 25),
        option("--world", choices=WORLDS, default=WORLDS[0], help=worlds),
        parameter("seed", "of the tasks and the images"),
    )
    add_options(parser.add_argument_group("drawing"), *options.SAMPLING)
    add_options(parser.add_argument_group("model"), *options.MODEL)
    out = f"where {RECORD} and the contact sheet {SHEET} go (%(default)s)"
    bar = f"exit with {UNDER_THE_BAR} where fewer of a world's images are right"
    add_options(
        parser.add_argument_group("output"),
        pathname("--out", "DIR", out, default=Path("out/score")),
        number("--fail-under", "PERCENT", bar, kind=float),
        flag("--quiet", "no progress bar and no tables, only the paths"),
    )
    parser.set_defaults(max_batch=1, max_prompt_tokens=None)


def run(arguments: argparse.Namespace) -> int:
    """Draw, judge, and write what is there, after an interrupt too; returns the exit code."""
    sampling = options.sampling_arguments(arguments)
    check(arguments)
    make_folder("--out", arguments.out)
    # PyTorch takes seconds to import: not for --help
    from tqdm import tqdm

    from blip3o_rt.measure.shapes.score import check_model, draw_and_judge, share_right, table
    from blip3o_rt.measure.shapes.tasks import draw_foreign_tasks, draw_tasks

    tasks = draw_tasks(arguments.count, arguments.seed) if arguments.world != "foreign" else []
    if arguments.world != "own":
        tasks += draw_foreign_tasks(arguments.count, arguments.seed)
    drawn: list[Drawn] = []
    interrupt = None
    with few_threads():
        pipeline = drawing.load_pipeline(arguments)
        check_model(pipeline)
        # A bar is for people: none is drawn where standard error is not a terminal.
        with tqdm(total=len(tasks), desc="score", disable=arguments.quiet or None, leave=False) as bar:
            try:
                for one in draw_and_judge(pipeline, tasks, **sampling):
                    drawn.append(one)
                    bar.set_postfix_str(f"{100 * share_right(drawn):.0f}% right", refresh=False)
                    bar.update()
            except KeyboardInterrupt as error:
                interrupt = error
        write(arguments, pipeline, drawn, complete=interrupt is None)
    if drawn and not arguments.quiet:
        print(table(drawn))
    if interrupt is not None:
        print(f"blip3o-rt: {len(drawn)} of {len(tasks)} images were drawn", file=sys.stderr)
        raise interrupt
    return passes(drawn, arguments.fail_under)


def passes(drawn: list[Drawn], bar: float | None) -> int:
    """The exit code: UNDER_THE_BAR where fewer of a world's images are right than the bar asks."""
    from blip3o_rt.measure.shapes.score import share_right

    code = 0
    for words, foreign in (("images", False), ("foreign edits", True)):
        world = [one for one in drawn if (one.task.foreign is not None) == foreign]
        if bar is not None and world and 100 * share_right(world) < bar:
            share = f"{100 * share_right(world):.1f}% of the {words} are right"
            print(f"blip3o-rt: {share}, under the bar of {bar:g}%", file=sys.stderr)
            code = UNDER_THE_BAR
    return code


def few_threads() -> AbstractContextManager[None]:
    """One thread within, unless OMP_NUM_THREADS says how many.

    A model of the shapes gives a second thread nothing to do, and on a busy machine waits long for it.
    """
    from blip3o_rt.isolation import num_threads

    return nullcontext() if "OMP_NUM_THREADS" in os.environ else num_threads(1)


def check(arguments: argparse.Namespace) -> None:
    """Raise ParameterError for a count, a seed, a bar or a folder that cannot be."""
    if not 1 <= arguments.count <= MAX_COUNT:
        raise ParameterError(
            f"--count is {arguments.count}: accepted is a whole number from 1 to {MAX_COUNT}"
        )
    if arguments.seed + 4 * arguments.count > MAX_SEED:
        raise ParameterError(
            f"--seed is {arguments.seed} with --count {arguments.count}: the last image's seed, "
            f"seed + 4 x count, may be at most {MAX_SEED}"
        )
    bar = arguments.fail_under
    if bar is not None and not 0 <= bar <= 100:
        raise ParameterError(f"--fail-under is {bar:g}: accepted is a percentage from 0 to 100")
    if arguments.out.exists() and not arguments.out.is_dir():
        raise ParameterError(f"--out is {arguments.out}, a file: accepted is a folder")


def write(arguments: argparse.Namespace, pipeline: Pipeline, drawn: list[Drawn], complete: bool) -> None:
    """Write the record and, where anything was drawn, the contact sheet; prints their paths."""
    from blip3o_rt.measure.provenance import model_record, record_head, write_record
    from blip3o_rt.measure.shapes.contact_sheet import contact_sheet
    from blip3o_rt.measure.shapes.score import record
    from blip3o_rt.metadata import save_png

    head = record_head("score", ["blip3o-rt", *sys.argv[1:]])
    settings = named(vars(arguments), ("count", "seed", "world")) | options.sampling_arguments(arguments)
    model = model_record(pipeline, arguments.model)
    content = head | {"complete": complete, "model": model, "settings": settings} | record(drawn)
    write_record(arguments.out / RECORD, content)
    print(arguments.out / RECORD)
    if drawn:
        save_png(contact_sheet(drawn), arguments.out / SHEET, {})
        print(arguments.out / SHEET)
