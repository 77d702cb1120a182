"""blip3o-rt edit: a picture changed as a prompt says."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from blip3o_rt.cli import pictures
from blip3o_rt.params import image_seeds


def add_parser(subparsers: Any) -> None:
    """Add the command's parser to the result of ArgumentParser.add_subparsers."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "edit", help="change a picture as a prompt says", description="Change a picture as a prompt says."
    )
    parser.add_argument("prompt", metavar="PROMPT", help="what to change, in words")
    parser.add_argument(
        "image", nargs="+", type=Path, metavar="IMAGE", help="the picture to edit, or several"
    )
    pictures.add_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Make n edits of the reference picture (or several together) and write them; returns the exit code."""
    keywords = pictures.generation_arguments(arguments)
    seeds = image_seeds(arguments.seed, arguments.n)
    paths = pictures.picture_paths(arguments.out, [arguments.prompt], seeds)
    pictures.check_output_files(arguments, paths)
    # NumPy and PyTorch take seconds to import: not for --help
    from blip3o_rt.images import load_reference

    # before the model: a bad file costs no waiting
    references = [load_reference(path) for path in arguments.image]
    pipeline = pictures.load_pipeline(arguments)
    pictures.draw(
        lambda save: pipeline.edit(arguments.prompt, references, on_image=save, **keywords),
        paths,
        arguments,
        pipeline,
    )
    return 0
