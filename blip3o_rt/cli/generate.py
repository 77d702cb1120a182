"""blip3o-rt generate: images from prompts."""

from __future__ import annotations

import argparse

from blip3o_rt.cli import drawing, options, outputs
from blip3o_rt.errors import ParameterError

SUMMARY = "draw images from prompts"
DESCRIPTION = "Draw images from prompts."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    parser.add_argument("prompt", nargs="*", metavar="PROMPT", help="what to draw, in words")
    options.add_image_options(parser)
    parser.set_defaults(task="text-to-image", liked={})


def run(arguments: argparse.Namespace) -> int:
    """Draw n images of every prompt and write them; returns the exit code."""
    prompts = arguments.prompt or [arguments.liked.get("prompt")]
    if prompts == [None]:
        raise ParameterError("a prompt is needed: PROMPT (see blip3o-rt generate --help)")
    keywords = options.request_arguments(arguments)
    files = outputs.ImageFiles(arguments, prompts)
    return drawing.draw(
        lambda pipeline, save: pipeline.generate(prompts, on_image=save, **keywords), files, arguments
    )
