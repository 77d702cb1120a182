"""What generate and edit share: their options, loading the model, and writing pictures and reports."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blip3o_rt import trace
from blip3o_rt.errors import ParameterError
from blip3o_rt.params import (
    DiffusionParams,
    SamplingParams,
    check_max_batch,
    check_max_prompt_tokens,
    image_seeds,
)
from blip3o_rt.switches import EXACT, check_tier, parse_switches

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
    drawing = parser.add_argument_group("drawing")
    drawing.add_argument(
        "-n", type=int, default=1, help="pictures per prompt; picture i uses seed + i (%(default)s)"
    )
    drawing.add_argument(
        "--seed", type=int, default=SamplingParams().seed, help="same seed, same picture (%(default)s)"
    )
    add_sampling_options(drawing)
    model = add_model_options(parser)
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
    traces = output.add_mutually_exclusive_group()
    traces.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="write a trace of every stage, step and op for ui.perfetto.dev, a .json or .json.gz",
    )
    traces.add_argument(
        "--nvtx", action="store_true", help="give the same ranges to NVTX, for nsys or ncu on a GPU"
    )
    output.add_argument(
        "--trace-tokens",
        type=int,
        default=trace.DEFAULT_TOKENS,
        metavar="N",
        help="trace the first N tokens of a plan, 0: all (%(default)s)",
    )
    output.add_argument("--quiet", action="store_true", help="no progress bars and no table, only the paths")


def add_sampling_options(drawing: argparse._ArgumentGroup) -> None:
    """How tokens are drawn and the latent is denoised, apart from the seed."""
    sampling, diffusion = SamplingParams(), DiffusionParams()
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


def add_model_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Which model, on what and how exact; returns the group, for more options of the model."""
    model = parser.add_argument_group("model")
    model.add_argument("--model", type=Path, metavar="DIR", help="a checkpoint, converted or as published")
    add_published_options(model)
    model.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    model.add_argument(
        "--dtype", default="auto", choices=("auto", "fp32", "bf16"), help="arithmetic (%(default)s)"
    )
    add_tier_options(model)
    model.add_argument(
        "--cache-dir", type=Path, metavar="DIR", help="keep a published checkpoint's converted form here"
    )
    return model


def add_published_options(model: argparse._ArgumentGroup) -> None:
    """What a published checkpoint refers to by name, where it is somewhere else or another one."""
    model.add_argument(
        "--diffusion", type=Path, metavar="DIR", help="the published checkpoint's diffusers folder"
    )
    model.add_argument("--ta-tok", type=Path, metavar="FILE", help="the published checkpoint's ta_tok.pth")


def add_tier_options(model: argparse._ArgumentGroup) -> None:
    """How exact the mathematics is."""
    model.add_argument(
        "--tier",
        default=EXACT,
        metavar="TIER",
        help="exact, the published mathematics, or fast, with lossy switches (%(default)s)",
    )
    model.add_argument(
        "--switch",
        action="append",
        metavar="NAME=SETTING",
        help="a switch of the fast tier, as ar_weights=int8; again for another (without any: those of little "
        "cost)",
    )


def generation_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of Pipeline.generate and Pipeline.edit, checked before a model is loaded.

    Raises ParameterError on a value out of range.
    """
    options = drawing_options(arguments)
    check_tier(arguments.tier, parse_switches(arguments.switch))
    image_seeds(arguments.seed, arguments.n)
    if arguments.max_batch is not None:
        check_max_batch(arguments.max_batch)
    if arguments.max_prompt_tokens is not None:
        check_max_prompt_tokens(arguments.max_prompt_tokens)
    return {"n": arguments.n, "seed": arguments.seed, **options, "progress": not arguments.quiet}


def drawing_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What add_sampling_options asked for, as keyword arguments of Pipeline.generate and Pipeline.edit.

    Raises ParameterError on a value out of range, the seed's too.
    """
    sampling = SamplingParams(
        seed=arguments.seed,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        image_tokens_only=not arguments.whole_vocabulary,
    )
    diffusion = DiffusionParams(steps=arguments.steps, guidance=arguments.guidance)
    return {
        "steps": diffusion.steps,
        "guidance": diffusion.guidance,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "image_tokens_only": sampling.image_tokens_only,
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


def check_output_files(arguments: argparse.Namespace, pictures: Sequence[Path]) -> None:
    """Make the folders of the report and of the trace, where they are wanted.

    Raises ParameterError where one cannot be written there, or would replace a picture or the other.
    """
    taken = {path.resolve(): "a picture" for path in pictures}
    if arguments.trace is not None:
        trace.check_path(arguments.trace)
    if arguments.trace_tokens < 0:
        raise ParameterError(f"--trace-tokens is {arguments.trace_tokens}: accepted is 0 (all) or more")
    for option, file in (("--report", arguments.report), ("--trace", arguments.trace)):
        if file is None:
            continue
        if file.is_dir():
            raise ParameterError(f"{option} is {file}, a folder: accepted is a file's path")
        if file.resolve() in taken:
            place = taken[file.resolve()]
            raise ParameterError(f"{option} is {file}, where {place} goes: accepted is another file's path")
        make_folder(option, file.parent)
        if file.exists() and not os.access(file, os.W_OK):
            raise ParameterError(f"{option} is {file}, a file that may not be written: choose another")
        taken[file.resolve()] = "the report"


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


def load_pipeline(arguments: argparse.Namespace, **options: Any) -> Pipeline:
    """The model the arguments name, on the device they name; options are further ones of Pipeline.load."""
    from blip3o_rt.pipeline import Pipeline  # PyTorch takes seconds to import: not for --help

    sizes = {"max_batch": arguments.max_batch, "max_prompt_tokens": arguments.max_prompt_tokens}
    return Pipeline.load(
        arguments.model,
        device=arguments.device,
        dtype=arguments.dtype,
        tier=arguments.tier,
        switches=parse_switches(arguments.switch),
        diffusion=arguments.diffusion,
        ta_tok=arguments.ta_tok,
        cache_dir=arguments.cache_dir,
        **{name: size for name, size in sizes.items() if size is not None},
        **options,
    )


def ranges(arguments: argparse.Namespace, pipeline: Pipeline) -> AbstractContextManager[None]:
    """The trace or the NVTX ranges that the options ask for."""
    if arguments.trace is not None:
        return trace.recorded(arguments.trace, pipeline.device, arguments.trace_tokens or None)
    return trace.nvtx() if arguments.nvtx else nullcontext()


def draw(
    request: Callable[[Callable[[int, Image.Image], None]], Result],
    paths: Sequence[Path],
    arguments: argparse.Namespace,
    pipeline: Pipeline,
) -> None:
    """Make the pictures, then write the report and the trace and print the table.

    request is given what to call with each picture and its index as soon as it is there: the picture is saved
    and its path printed, whatever becomes of the others.
    """
    from blip3o_rt.metadata import save_png

    def save(index: int, image: Image.Image) -> None:
        save_png(image, paths[index], image.info)
        print(paths[index], flush=True)

    with ranges(arguments, pipeline):
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
