"""The options that commands share, each declared once; defaults are those of the Python API."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

from blip3o_rt import params, trace
from blip3o_rt.cli.like import check_model
from blip3o_rt.errors import ParameterError
from blip3o_rt.switches import EXACT, check_tier, parse_switches

Option: TypeAlias = tuple[tuple[str, ...], dict[str, Any]]

DEFAULT_OUT = Path("out")
_PARAMETERS = dataclasses.asdict(params.SamplingParams()) | dataclasses.asdict(params.DiffusionParams())


class Renamed(argparse.Action):
    """An option whose first name is today's; the others still work, and say so."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        name, *earlier = self.option_strings
        if option in earlier:
            print(f"blip3o-rt: {option} is deprecated: its name is {name}", file=sys.stderr)
        setattr(namespace, self.dest, values)


class Count(argparse.Action):
    """An option that takes whole numbers from 1."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        if values < 1:
            name = self.option_strings[0]
            raise ParameterError(f"{name} is {values}: accepted is a whole number from 1")
        setattr(namespace, self.dest, values)


def option(*flags: str, **keywords: Any) -> Option:
    """One option, as ArgumentParser.add_argument takes it."""
    return flags, keywords


def user_path(text: str) -> Path:
    """A path as a user writes it; ~ is the home folder."""
    try:
        return Path(text).expanduser()
    except RuntimeError:  # of a user that there is none of
        return Path(text)


def draft_window(text: str) -> int | str:
    """A number where it is one; check_draft_window says what else is accepted."""
    return int(text) if text.isascii() and text.isdigit() else text


def pathname(name: str, metavar: str, meaning: str | None = None, **keywords: Any) -> Option:
    """The option or the argument of a file or folder."""
    return option(name, type=user_path, metavar=metavar, help=meaning, **keywords)


def number(
    name: str, metavar: str, meaning: str, default: float | None = None, kind: type[float] = int
) -> Option:
    """The option of a number, whose help ends with its default."""
    shown = meaning if default is None else f"{meaning} ({default:g})".lstrip()
    return option(name, type=kind, metavar=metavar, default=default, help=shown)


def count(name: str, metavar: str, meaning: str, default: int | None = None) -> Option:
    """The option of a number that is 1 or more."""
    flags, keywords = number(name, metavar, meaning, default)
    return flags, {**keywords, "action": Count}


def flag(name: str, meaning: str) -> Option:
    """An option that is off unless it is given."""
    return option(name, action="store_true", help=meaning)


def parameter(name: str, meaning: str) -> Option:
    """The option of a parameter that has a default; its type is the default's."""
    default = _PARAMETERS[name]
    flag = f"--{name.replace('_', '-')}"
    return option(flag, type=type(default), default=default, help=f"{meaning} (%(default)s)")


MEASURED = option(
    "--model",
    "--size",
    "--checkpoint",
    dest="model",
    action=Renamed,
    default="shapes",
    metavar="NAME|DIR",
    help="published or tiny (random weights), shapes (the embedded model), or a folder (%(default)s)",
)
DIFFUSION = pathname("--diffusion", "DIR", "the published checkpoint's diffusers folder")
TA_TOK = pathname("--ta-tok", "FILE", "the published checkpoint's ta_tok.pth")
DEVICE = option("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
PUBLISHED = (
    DIFFUSION,
    TA_TOK,
    option("--variant", metavar="NAME", help="of the weights, as fp16 (the plain ones)"),
    flag(
        "--allow-base-weights",
        "take the diffusers folder's untrained transformer where the checkpoint has none",
    ),
)
COMPUTING = (
    DEVICE,
    option(
        "--dtype",
        default="auto",
        choices=("auto", "fp32", "bf16", "mixed"),
        help="bf16, fp32, or mixed: bf16 weights with fp32 arithmetic (%(default)s)",
    ),
    option(
        "--tier",
        default=EXACT,
        metavar="TIER",
        help="exact, the published mathematics, or fast, with lossy switches (%(default)s)",
    ),
    option(
        "--switch",
        action="append",
        metavar="NAME=SETTING",
        help="a switch of the fast tier, as ar_weights=int8; again for another (none: those of little cost)",
    ),
)

REQUEST = (
    option("-n", type=int, default=1, help="images per prompt; image i uses seed + i (%(default)s)"),
    parameter("seed", "same seed, same image"),
    pathname(
        "--like",
        "FILE.png",
        "draw the image of a file again: its prompt, seed and parameters, except those given here",
    ),
)
SAMPLING = (
    parameter("steps", "denoising steps"),
    parameter("guidance", "how closely to follow the plan, 1: off"),
    parameter("temperature", "of the tokens"),
    option(
        "--top-k",
        type=int,
        help="likeliest tokens to sample from, 0: all, 1: greedy (1200, scaled to the codebook)",
    ),
    parameter("top_p", "probability mass of the tokens to sample from"),
    option(
        "--draft-window",
        type=draft_window,
        default=params.AUTO,
        metavar="N",
        help=f"tokens to guess at a time, 1 (off) to {params.MAX_DRAFT_WINDOW} or %(default)s; same image "
        "(%(default)s)",
    ),
    option(
        "--whole-vocabulary",
        action="store_false",
        dest="image_tokens_only",
        help="sample among all tokens as the published code does, not only image tokens",
    ),
)
MODEL = (
    pathname("--model", "DIR", "a checkpoint, converted or as published"),
    *PUBLISHED,
    *COMPUTING,
    pathname("--cache-dir", "DIR", "keep the converted form of a published one here"),
)
MAX_PROMPT_TOKENS = number("--max-prompt-tokens", "N", "longest prompt, with its reference images")
SIZES = (number("--max-batch", "N", "images whose tokens are sampled together"), MAX_PROMPT_TOKENS)
OUTPUT = (
    pathname("--out", "PATH", "a .png for one image, else a folder (out/)", default=DEFAULT_OUT),
    flag("--overwrite", "replace images in the folder (else they are numbered)"),
    pathname("--report", "FILE", "write time, memory and implementations as JSON"),
    number("--trace-tokens", "N", "trace the first N tokens of a plan, 0: all", trace.DEFAULT_TOKENS),
    flag("--quiet", "no progress bars and no table, only the paths"),
)
TRACES = (  # one of them at a time
    pathname(
        "--trace",
        "FILE",
        "write a trace of every stage, step and op for ui.perfetto.dev, a .json or .json.gz",
    ),
    flag("--nvtx", "give the same ranges to NVTX, for nsys or ncu on a GPU"),
)


def add_options(target: argparse._ActionsContainer, *options: Option) -> None:
    """Add options to a parser or a group of one."""
    for flags, keywords in options:
        target.add_argument(*flags, **keywords)


def add_command(subparsers: Any, name: str, module: ModuleType) -> None:
    """Add the command of a module to the result of ArgumentParser.add_subparsers."""
    parser = subparsers.add_parser(name, help=module.SUMMARY, description=module.DESCRIPTION)
    parser.set_defaults(run=module.run)
    module.add_arguments(parser)


def add_image_options(parser: argparse.ArgumentParser) -> None:
    """Every option of a command that makes images."""
    add_options(parser.add_argument_group("drawing"), *REQUEST, *SAMPLING)
    add_options(parser.add_argument_group("model"), *MODEL, *SIZES)
    output = parser.add_argument_group("output")
    add_options(output, *OUTPUT)
    add_options(output.add_mutually_exclusive_group(), *TRACES)


def request_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of Pipeline.generate and Pipeline.edit, checked before a model is loaded.

    Raises:
        ParameterError: A value is out of range.
    """
    options = sampling_arguments(arguments)
    check_model(arguments)
    model_arguments(arguments)
    params.image_seeds(arguments.seed, arguments.n)
    return {"n": arguments.n, "seed": arguments.seed, **options, "progress": not arguments.quiet}


def sampling_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of SAMPLING as keyword arguments of Pipeline.generate and Pipeline.edit.

    Raises:
        ParameterError: A value, or the seed, is out of range.
    """
    given = vars(arguments)
    params.SamplingParams(arguments.seed, **params.named(given, params.SAMPLING_NAMES))
    params.DiffusionParams(**params.named(given, params.DIFFUSION_NAMES))
    params.check_draft_window(arguments.draft_window)
    return params.named(given, (*params.SAMPLING_NAMES, *params.DIFFUSION_NAMES, "draft_window"))


def model_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of MODEL and SIZES as keyword arguments of Pipeline.load, checked.

    Raises:
        ParameterError: A value is out of range.
    """
    given = vars(arguments)
    switches = parse_switches(arguments.switch)
    check_tier(arguments.tier, switches)
    names = ("device", "dtype", "tier", "diffusion", "ta_tok", "variant", "allow_base_weights", "cache_dir")
    sizes = {"max_batch": params.check_max_batch, "max_prompt_tokens": params.check_max_prompt_tokens}
    return {
        "path": None if arguments.model is None else str(arguments.model),
        "switches": switches,
        **params.named(given, names),
        **{name: check(given[name]) for name, check in sizes.items() if given[name] is not None},
    }
