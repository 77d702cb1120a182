"""blip3o-rt validate: every op, every stage and the whole pipeline against what they must compute."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from blip3o_rt.cli import options
from blip3o_rt.cli.options import add_options, count, option, pathname
from blip3o_rt.errors import ParameterError
from blip3o_rt.params import named

SUMMARY = "compare every op, every stage and the pipeline with what they must compute"
DESCRIPTION = (
    "Compare every op with its definition in float64, and every stage and the whole pipeline with "
    "transformers and diffusers on the same checkpoint. Exits with 1 where a line fails, or where nothing "
    "was compared."
)
FAILED_LINES = 1
DTYPES = ("fp32", "bf16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    from blip3o_rt.measure.validate.line import GROUPS

    model = parser.add_argument_group("model")
    recorded = (
        "recorded results of the published code: checkpoint/, golden.safetensors, golden.png, input.png"
    )
    add_options(
        model.add_mutually_exclusive_group(), options.MEASURED, pathname("--against", "DIR", recorded)
    )
    work = "keep a random checkpoint here for the next run (without: that of bench, or none is kept)"
    add_options(model, options.DIFFUSION, options.TA_TOK, options.DEVICE, pathname("--work", "DIR", work))
    groups = f"of {', '.join(GROUPS)} (all that apply)"
    kernel = (
        "a file that registers implementations of ops; they alone are compared, and with --only they run in "
        "the stages too; repeatable"
    )
    add_options(
        parser.add_argument_group("what is compared"),
        option("--only", type=_names, metavar="GROUP,...", help=groups),
        option("--op", action="append", default=[], metavar="NAME", help="one op alone; repeatable"),
        option("--dtype", type=_names, default=DTYPES, metavar="fp32,bf16", help="(both)"),
        pathname("--kernel", "FILE.py", kernel, action="append", default=[]),
        count("--tokens", "N", "image tokens drawn (all, or 8 of a large model)"),
        count("--latent", "N", "side of the latent (the model's, or 8 of a large one)"),
        count("--steps", "N", "denoising steps (4, or 2 of a large model)"),
    )
    out = "where validate.json, validate.html and the images go (%(default)s)"
    add_options(parser, pathname("--out", "DIR", out, default=Path("out/validate")))


def run(arguments: argparse.Namespace) -> int:
    """Validate; returns the exit code: 0 where there are lines and every one passes, else 1."""
    _check(arguments)
    # PyTorch takes seconds to import: not for --help
    from transformers.utils import logging

    from blip3o_rt.measure.validate.run import Options, validate

    logging.set_verbosity_error()
    names = ("model", "against", "diffusion", "ta_tok", "only", "device", "work", "tokens", "latent", "steps")
    chosen = Options(
        **named(vars(arguments), names),
        op_names=tuple(arguments.op),
        dtypes=tuple(dtype for dtype in DTYPES if dtype in arguments.dtype),
        kernels=tuple(arguments.kernel),
        command=["blip3o-rt", *sys.argv[1:]],
    )
    lines = validate(chosen, arguments.out, lambda text: print(text, flush=True))
    return 0 if lines and all(line.passed for line in lines) else FAILED_LINES


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _check(arguments: argparse.Namespace) -> None:
    """Raise ParameterError for names and numbers that are not accepted."""
    from blip3o_rt.measure import EMBEDDED_MODEL, RANDOM_MODELS
    from blip3o_rt.measure.validate.line import GROUPS

    for flag, names, known in (("--only", arguments.only, GROUPS), ("--dtype", arguments.dtype, DTYPES)):
        unknown = [name for name in names or () if name not in known]
        if unknown or names == ():
            raise ParameterError(f"{flag} is {','.join(unknown) or 'empty'}: accepted are {','.join(known)}")
    if "golden" in (arguments.only or ()) and arguments.against is None:
        raise ParameterError("--only golden needs --against DIR, the folder of the recorded results")
    if (arguments.diffusion or arguments.ta_tok) and arguments.model in (EMBEDDED_MODEL, *RANDOM_MODELS):
        raise ParameterError("--diffusion and --ta-tok are of a published checkpoint: give --model DIR too")
    if arguments.out.exists() and not arguments.out.is_dir():
        raise ParameterError(f"--out is {arguments.out}, a file: accepted is a folder")
