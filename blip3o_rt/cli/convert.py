"""blip3o-rt convert: a published checkpoint into the runtime's layout, or a check of one converted before."""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

from blip3o_rt.cli import options
from blip3o_rt.cli.options import add_options, flag, number, option, pathname
from blip3o_rt.errors import Blip3oWarning, ParameterError
from blip3o_rt.params import named
from blip3o_rt.switches import parse_switches

SUMMARY = "convert a published checkpoint"
DESCRIPTION = "Convert the published checkpoint SRC into the folder DST, or check DST with --verify."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    lossy = "write the weights of a lossy switch, as ar_weights=int8, for the fast tier alone"
    add_options(
        parser,
        pathname("source", "SRC", "the published checkpoint's folder", nargs="?"),
        pathname("destination", "DST", "a new folder", nargs="?"),
        *options.PUBLISHED,
        pathname("--lora", "DIR", "a LoRA adapter to merge into the weights"),
        number("--lora-scale", "X", "of the adapter", 1.0, float),
        option("--dtype", choices=("bf16", "fp32"), default="bf16", help="of the weights (%(default)s)"),
        option("--switch", action="append", metavar="NAME=SETTING", help=lossy),
        flag("--force", "replace an earlier conversion at DST"),
        flag("--quiet", "no progress bar"),
        pathname("--verify", "DST", "only compare DST's files with the checksums in its manifest"),
    )


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
    names = ("diffusion", "ta_tok", "variant", "allow_base_weights")
    manifest = convert(
        Source(arguments.source, **named(vars(arguments), names)),
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
