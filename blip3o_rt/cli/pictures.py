"""What generate and edit share: their options, loading the model, and writing pictures and reports."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blip3o_rt.errors import ParameterError
from blip3o_rt.params import (
    DiffusionParams,
    SamplingParams,
    check_max_batch,
    check_max_prompt_tokens,
    image_seeds,
)

if TYPE_CHECKING:
    from PIL import Image

    from blip3o_rt.pipeline import Pipeline
    from blip3o_rt.report import Report
    from blip3o_rt.result import Result

DEFAULT_OUT = Path("out")
OTHER_PICTURE_SUFFIXES = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
MAX_NAME_LENGTH = 48  # letters of the prompt in a file name; file systems take 255 bytes


def add_options(parser: argparse.ArgumentParser) -> None:
    """Every option of a command that makes pictures."""
    sampling, diffusion = SamplingParams(), DiffusionParams()
    drawing = parser.add_argument_group("drawing")
    drawing.add_argument(
        "-n", type=int, default=1, help="pictures per prompt; picture i uses seed + i (%(default)s)"
    )
    drawing.add_argument(
        "--seed", type=int, default=sampling.seed, help="same seed, same picture (%(default)s)"
    )
    drawing.add_argument("--steps", type=int, default=diffusion.steps, help="denoising steps (%(default)s)")
    drawing.add_argument(
        "--guidance",
        type=float,
        default=diffusion.guidance,
        help="how closely to follow the plan, 1: off (%(default)s)",
    )
    drawing.add_argument(
        "--temperature", type=float, default=sampling.temperature, help="of the tokens (%(default)s)"
    )
    drawing.add_argument(
        "--top-k",
        type=int,
        help="likeliest tokens to draw from, 0: all, 1: greedy (1200, scaled to the codebook)",
    )
    drawing.add_argument(
        "--top-p",
        type=float,
        default=sampling.top_p,
        help="probability mass of the tokens to draw from (%(default)s)",
    )
    drawing.add_argument(
        "--whole-vocabulary",
        action="store_true",
        help="draw among all tokens as the published code does, not only image tokens",
    )
    model = parser.add_argument_group("model")
    model.add_argument("--model", type=Path, metavar="DIR", help="a checkpoint, converted or as published")
    model.add_argument(
        "--diffusion", type=Path, metavar="DIR", help="the published checkpoint's diffusers folder"
    )
    model.add_argument("--ta-tok", type=Path, metavar="FILE", help="the published checkpoint's ta_tok.pth")
    model.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    model.add_argument(
        "--dtype", default="auto", choices=("auto", "fp32", "bf16"), help="arithmetic (%(default)s)"
    )
    model.add_argument(
        "--cache-dir", type=Path, metavar="DIR", help="keep a published checkpoint's converted form here"
    )
    model.add_argument("--max-batch", type=int, metavar="N", help="pictures whose tokens are drawn together")
    model.add_argument(
        "--max-prompt-tokens", type=int, metavar="N", help="longest prompt, with its reference pictures"
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--out",
        type=Path,
        default=DEFAULT_OUT,
        metavar="PATH",
        help="a .png for one picture, else a folder (out/)",
    )
    output.add_argument(
        "--report", type=Path, metavar="FILE", help="write time, memory and implementations as JSON"
    )
    output.add_argument("--quiet", action="store_true", help="no progress bars and no table, only the paths")


def generation_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of Pipeline.generate and Pipeline.edit, checked before a model is loaded.

    Raises ParameterError on a value out of range.
    """
    sampling = SamplingParams(
        seed=arguments.seed,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        image_tokens_only=not arguments.whole_vocabulary,
    )
    diffusion = DiffusionParams(steps=arguments.steps, guidance=arguments.guidance)
    image_seeds(arguments.seed, arguments.n)
    if arguments.max_batch is not None:
        check_max_batch(arguments.max_batch)
    if arguments.max_prompt_tokens is not None:
        check_max_prompt_tokens(arguments.max_prompt_tokens)
    return {
        "n": arguments.n,
        "seed": sampling.seed,
        "steps": diffusion.steps,
        "guidance": diffusion.guidance,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "image_tokens_only": sampling.image_tokens_only,
        "progress": not arguments.quiet,
    }


def picture_paths(out: Path, prompts: Sequence[str], seeds: Sequence[int]) -> list[Path]:
    """Where each picture goes, all seeds of the first prompt first; folders that are missing are made.

    A `.png` takes exactly one picture; anything else is a folder, in which pictures are named after
    prompt and seed and replace what an earlier run called the same. Raises ParameterError for several
    pictures and one `.png`, for another picture format, or where the folder is a file or cannot be written.
    """
    count = len(prompts) * len(seeds)
    if out.suffix.lower() == ".png" and not out.is_dir():
        if count > 1:
            raise ParameterError(f"--out is {out} but there are {count} pictures to write: give a folder")
        make_folder("--out", out.parent)
        return [out]
    if out.suffix.lower() in OTHER_PICTURE_SUFFIXES and not out.is_dir():
        raise ParameterError(f"--out is {out}: accepted is a .png for one picture, or a folder")
    if out.exists() and not out.is_dir():
        raise ParameterError(f"--out is {out}, a file: accepted is a .png for one picture, or a folder")
    make_folder("--out", out)
    paths: list[Path] = []
    for prompt in prompts:
        name = unused_name(file_name(prompt), seeds[0], paths)
        paths += [out / f"{name}-{seed}.png" for seed in seeds]
    return paths


def check_report_path(report: Path | None, pictures: Sequence[Path]) -> None:
    """Make the report's folder, if a report is wanted.

    Raises ParameterError where the report cannot be written there or would replace one of the pictures.
    """
    if report is None:
        return
    if report.is_dir():
        raise ParameterError(f"--report is {report}, a folder: accepted is a file's path")
    if report.resolve() in {path.resolve() for path in pictures}:
        raise ParameterError(f"--report is {report}, where a picture goes: accepted is another file's path")
    make_folder("--report", report.parent)
    if report.exists() and not os.access(report, os.W_OK):
        raise ParameterError(f"--report is {report}, a file that may not be written: choose another")


def make_folder(option: str, folder: Path) -> None:
    """Make a folder if missing. Raises ParameterError where no file can be made in it."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ParameterError(f"{option} needs the folder {folder}, which may not be written: choose another")


def file_name(prompt: str) -> str:
    """A prompt's letters and digits, words joined by hyphens; "picture" where it has none."""
    words = "".join(letter if letter.isalnum() else " " for letter in prompt.lower()).split()
    return "-".join(words)[:MAX_NAME_LENGTH].strip("-") or "picture"


def unused_name(name: str, seed: int, taken: Sequence[Path]) -> str:
    """The name, numbered where an earlier prompt of the same run came out alike."""
    names = {path.name for path in taken}
    number, candidate = 1, name
    while f"{candidate}-{seed}.png" in names:
        number += 1
        candidate = f"{name}-{number}"
    return candidate


def load_pipeline(arguments: argparse.Namespace) -> Pipeline:
    """The model the options name, on the device they name."""
    from blip3o_rt.pipeline import Pipeline  # PyTorch takes seconds to import: not for --help

    sizes = {"max_batch": arguments.max_batch, "max_prompt_tokens": arguments.max_prompt_tokens}
    return Pipeline.load(
        arguments.model,
        device=arguments.device,
        dtype=arguments.dtype,
        diffusion=arguments.diffusion,
        ta_tok=arguments.ta_tok,
        cache_dir=arguments.cache_dir,
        **{name: size for name, size in sizes.items() if size is not None},
    )


def draw(
    request: Callable[[Callable[[int, Image.Image], None]], Result],
    paths: Sequence[Path],
    arguments: argparse.Namespace,
) -> None:
    """Make the pictures, then write the report and print the table.

    request is given what to call with each picture and its index as soon as it is there: the picture is saved
    and its path printed, whatever becomes of the others.
    """
    from blip3o_rt.metadata import save_png

    def save(index: int, image: Image.Image) -> None:
        save_png(image, paths[index], image.info)
        print(paths[index], flush=True)

    result = request(save)
    for plan, path in zip(result.plans, paths, strict=True):
        if plan.non_image_positions:
            print(
                f"blip3o-rt: warning: {path}: {len(plan.non_image_positions)} of its tokens, the first at "
                f"position {plan.non_image_positions[0]}, are not image tokens",
                file=sys.stderr,
            )
    if arguments.report is not None:
        write_report(result.report, arguments.report)
    if not arguments.quiet:
        print(result.report.table())


def write_report(report: Report, path: Path) -> None:
    """The report as JSON."""
    path.write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
