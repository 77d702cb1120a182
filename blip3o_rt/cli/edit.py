"""blip3o-rt edit: an image changed as a prompt says."""

from __future__ import annotations

import argparse

from blip3o_rt.cli import drawing, options, outputs
from blip3o_rt.errors import ParameterError

SUMMARY = "change an image as a prompt says"
DESCRIPTION = "Change an image as a prompt says."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    parser.usage = "%(prog)s [options] {PROMPT | --like FILE.png} IMAGE [IMAGE ...]"
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="what to change, in words")
    parser.add_argument("image", nargs="*", metavar="IMAGE", help="the image to edit, or several")
    options.add_image_options(parser)
    parser.set_defaults(task="edit", liked={})


def run(arguments: argparse.Namespace) -> int:
    """Make n edits of the reference image (or several together) and write them; returns the exit code."""
    prompt, images = arguments.prompt, arguments.image
    if arguments.liked:  # the words are the file's: what was given are images
        prompt, images = arguments.liked.get("prompt"), [prompt, *images] if prompt is not None else []
    if prompt is None or not images:
        missing = "IMAGE" if arguments.liked or prompt is not None else "PROMPT, IMAGE"
        raise ParameterError(f"a prompt and an image are needed: {missing} (see blip3o-rt edit --help)")
    keywords = options.request_arguments(arguments)
    files = outputs.ImageFiles(arguments, [prompt], images)
    # NumPy and PyTorch take seconds to import: not for --help
    from blip3o_rt.images import load_reference

    # before the model: a bad file costs no waiting
    references = [load_reference(image) for image in images]
    return drawing.draw(
        lambda pipeline, save: pipeline.edit(prompt, references, on_image=save, **keywords), files, arguments
    )
