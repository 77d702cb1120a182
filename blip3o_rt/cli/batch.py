"""blip3o-rt batch: a file of prompts or edits to a folder of images, on this machine or on a Ray cluster."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from blip3o_rt.cli import options
from blip3o_rt.cli.options import add_options, count, flag, number, option, parameter, pathname
from blip3o_rt.errors import ParameterError
from blip3o_rt.params import DIFFUSION_NAMES

SUMMARY = "draw the rows of a file, however many"
DESCRIPTION = (
    "Draw an image of every row of a file: of its prompt, or an edit of its image. Row i has seed + i. A run "
    "that was ended goes on where it was; a row that cannot be drawn costs only itself."
)
SOME_FAILED = 1
FORMATS = ("folder", "tar", "parquet")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    rows = "a .txt of prompts, or a .csv, .jsonl or .parquet with columns prompt and image (to edit)"
    add_options(parser, pathname("prompts", "PROMPTS", rows))
    add_options(parser.add_argument_group("drawing"), parameter("seed", "of row 0"), *options.SAMPLING)
    add_options(parser.add_argument_group("model"), *options.MODEL, *options.SIZES)
    add_options(
        parser.add_argument_group("output"),
        pathname("--out", "DIR", "new, or of a run to go on with", required=True),
        option(
            "--format", choices=FORMATS, default="folder", help="PNG, WebDataset or parquet (%(default)s)"
        ),
        count("--shard-rows", "N", "rows of a folder or file", 1000),
        flag("--quiet", "no progress bar"),
    )
    add_options(
        parser.add_argument_group("Ray"),
        option("--ray", metavar="ADDRESS", help="a cluster: auto, ray://HOST:PORT, or local"),
        count("--workers", "N", "models at a time", 1),
        number("--gpus-per-worker", "X", "1, or a fraction (1 on a GPU)", kind=float),
        number("--cpus-per-worker", "X", "", 1.0, float),
    )


def run(arguments: argparse.Namespace) -> int:
    """Draw what is missing of the batch; returns the exit code, 1 where rows failed."""
    sampling = options.sampling_arguments(arguments)
    model = options.model_arguments(arguments)
    if arguments.ray is None and arguments.workers != 1:
        raise ParameterError("--workers is for --ray: without it one process draws")

    from blip3o_rt.scale.shards import Batch, BatchFolder

    del sampling["draft_window"]  # it is time alone
    diffusion = {name: sampling.pop(name) for name in DIFFUSION_NAMES}
    kept = ("path", "dtype", "tier", "switches", "variant", "allow_base_weights")
    batch = Batch(
        str(arguments.prompts.absolute()),
        arguments.seed,
        arguments.format,
        arguments.shard_rows,
        sampling,
        diffusion,
        {name: model[name] for name in kept},
    )
    folder = BatchFolder(arguments.out, batch)
    with folder.in_use():
        rows = folder.open()
        draw(folder, model, rows, arguments)
    if not folder.failures:
        return 0
    print(
        f"blip3o-rt: {folder.failures} of {rows} rows failed: {folder.folder / 'failures'}", file=sys.stderr
    )
    return SOME_FAILED


def draw(folder: Any, model: dict[str, Any], rows: int, arguments: argparse.Namespace) -> None:
    """Draw the shards that are not finished, here or on Ray."""
    from tqdm import tqdm

    shards = folder.unfinished()
    left = sum(len(folder.missing(shard)) for shard in shards)
    # A bar is for people: none is drawn where standard error is not a terminal.
    with tqdm(total=rows, initial=rows - left, unit="row", disable=arguments.quiet or None) as bar:
        if not shards:
            return
        if arguments.ray is None:
            from blip3o_rt.scale.batch import draw_here

            draw_here(folder, model, shards, bar.update)
        else:
            from blip3o_rt.scale.ray_data import Workers, draw_on_ray

            workers = Workers(arguments.workers, arguments.cpus_per_worker, arguments.gpus_per_worker)
            draw_on_ray(folder, model, shards, arguments.ray, workers, bar.update)
