"""blip3o-rt generate: pictures from prompts."""

from __future__ import annotations

import argparse
from typing import Any

from blip3o_rt.cli import pictures
from blip3o_rt.params import image_seeds


def add_parser(subparsers: Any) -> None:
    """Add the command's parser to the result of ArgumentParser.add_subparsers."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "generate", help="draw pictures from prompts", description="Draw pictures from prompts."
    )
    parser.add_argument("prompt", nargs="+", metavar="PROMPT", help="what to draw, in words")
    pictures.add_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Draw n pictures of every prompt and write them; returns the exit code."""
    keywords = pictures.generation_arguments(arguments)
    seeds = image_seeds(arguments.seed, arguments.n)
    paths = pictures.picture_paths(arguments.out, arguments.prompt, seeds)
    pictures.check_output_files(arguments, paths)
    pipeline = pictures.load_pipeline(arguments)
    pictures.draw(
        lambda save: pipeline.generate(arguments.prompt, on_image=save, **keywords),
        paths,
        arguments,
        pipeline,
    )
    return 0
