"""What generate and edit do once their options are checked: load the model, draw, write reports."""

from __future__ import annotations

import argparse
import json
import re
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from blip3o_rt import trace
from blip3o_rt.cli.like import differences
from blip3o_rt.cli.options import model_arguments
from blip3o_rt.cli.outputs import ImageFiles
from blip3o_rt.errors import Blip3oWarning
from blip3o_rt.files import replacing

if TYPE_CHECKING:
    from PIL import Image

    from blip3o_rt.pipeline import Pipeline
    from blip3o_rt.result import Report, Result


CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")  # escaped in a path that is printed: a line for each


def load_pipeline(arguments: argparse.Namespace) -> Pipeline:
    """The model the arguments name, on the device they name."""
    from blip3o_rt.pipeline import Pipeline  # PyTorch takes seconds to import: not for --help

    model = model_arguments(arguments)
    return Pipeline.load(model.pop("path"), **model)


def ranges(arguments: argparse.Namespace, pipeline: Pipeline) -> AbstractContextManager[None]:
    """The trace or the NVTX ranges that the options ask for."""
    if arguments.trace is not None:
        return trace.recorded(arguments.trace, pipeline.device, arguments.trace_tokens or None)
    return trace.nvtx() if arguments.nvtx else nullcontext()


def draw(
    request: Callable[[Pipeline, Callable[[int, Image.Image], None]], Result],
    files: ImageFiles,
    arguments: argparse.Namespace,
) -> int:
    """Load the model, make the images, then write the report and the trace and print the table.

    Args:
        request: Draws; it is given the model, and what to call with each image and its index as soon as it is
            there. The image is saved and its path printed, whatever becomes of the others.
        files: Where the images go.
        arguments: The command's.

    Returns:
        The exit code.
    """
    pipeline = load_pipeline(arguments)
    paths: dict[int, Path] = {}

    def save(index: int, image: Image.Image) -> None:
        paths[index] = files.save(index, image)
        print(CONTROL.sub(lambda found: repr(found[0])[1:-1], str(paths[index])), flush=True)
        changed = differences(arguments.liked, image.info)
        if changed:
            warn(f"{paths[index]} differs from {arguments.like} in its {' and '.join(changed)}")

    with ranges(arguments, pipeline):
        result = request(pipeline, save)
    for index, plan in enumerate(result.plans):
        if plan.non_image_positions:
            warn(
                f"{paths[index]}: {len(plan.non_image_positions)} of its tokens, the first at position "
                f"{plan.non_image_positions[0]}, are not image tokens"
            )
    if arguments.report is not None:
        write_report(result.report, arguments.report)
    if not arguments.quiet:
        print(result.report.table())
    return 0


def warn(message: str) -> None:
    """One line on standard error, unless --quiet."""
    warnings.warn(message, Blip3oWarning, stacklevel=2)


def write_report(report: Report, path: Path) -> None:
    """The report as JSON."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
