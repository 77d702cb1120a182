"""blip3o-rt convert: a published checkpoint into the runtime's layout, or a check of one converted before."""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

from blip3o_rt.cli.options import BASE_WEIGHTS, DIFFUSION, TA_TOK, VARIANT, add_options, user_path
from blip3o_rt.errors import Blip3oWarning, ParameterError
from blip3o_rt.switches import parse_switches


def add_parser(subparsers: Any) -> None:
    """Add the command's parser to the result of ArgumentParser.add_subparsers."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "convert",
        help="convert a published checkpoint",
        description="Convert the published checkpoint SRC into the folder DST, or check DST with --verify.",
    )
    parser.add_argument(
        "source", nargs="?", type=user_path, metavar="SRC", help="the published checkpoint's folder"
    )
    parser.add_argument("destination", nargs="?", type=user_path, metavar="DST", help="a new folder")
    add_options(parser, DIFFUSION, TA_TOK, VARIANT, BASE_WEIGHTS)
    parser.add_argument(
        "--lora", type=user_path, metavar="DIR", help="a LoRA adapter to merge into the weights"
    )
    parser.add_argument(
        "--lora-scale", type=float, default=1.0, metavar="X", help="of the adapter (default: 1)"
    )
    parser.add_argument(
        "--dtype", choices=("bf16", "fp32"), default="bf16", help="of the weights (default: bf16)"
    )
    parser.add_argument(
        "--switch",
        action="append",
        metavar="NAME=SETTING",
        help="write the weights of a lossy switch, as ar_weights=int8, for the fast tier alone",
    )
    parser.add_argument("--force", action="store_true", help="replace an earlier conversion at DST")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument(
        "--verify",
        type=user_path,
        metavar="DST",
        help="only compare DST's files with the checksums in its manifest",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Convert or verify; returns the exit code."""
    if arguments.verify is not None:
        if arguments.source is not None:
            raise ParameterError("--verify takes one folder and no SRC: blip3o-rt convert --verify DST")
        return _verify(arguments.verify)
    if arguments.source is None or arguments.destination is None:
        raise ParameterError("two folders are needed: blip3o-rt convert SRC DST")
    return _convert(arguments)


def _verify(folder: Path) -> int:
    from blip3o_rt.checkpoint.manifest import Manifest, check_files

    manifest = Manifest.read(folder)
    check_files(folder, manifest, checksums=True)
    print(f"{folder}: {len(manifest.files)} files are as they were written ({manifest.dtype})")
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    from blip3o_rt.checkpoint.convert import convert  # PyTorch takes seconds to import: not for --help
    from blip3o_rt.checkpoint.source import Source

    start = time.perf_counter()
    manifest = convert(
        Source(
            arguments.source,
            arguments.diffusion,
            arguments.ta_tok,
            arguments.variant,
            arguments.allow_base_weights,
        ),
        arguments.destination,
        dtype=arguments.dtype,
        switches=parse_switches(arguments.switch),
        lora=arguments.lora,
        lora_scale=arguments.lora_scale,
        progress=not arguments.quiet,
        force=arguments.force,
    )
    for warning in manifest.warnings:
        warnings.warn(warning, Blip3oWarning, stacklevel=2)
    from blip3o_rt.result import peak_memory_bytes  # with PyTorch, which takes seconds to import

    size = sum(record.size for record in manifest.files.values())
    print(
        f"{arguments.destination}: {size / 1e9:.2f} GB in {manifest.dtype}, "
        f"{time.perf_counter() - start:.1f} s, peak memory {peak_memory_bytes() / 2**20:.0f} MiB"
    )
    return 0
