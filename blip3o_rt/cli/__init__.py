"""The blip3o-rt command: generate, edit, convert and doctor."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from blip3o_rt import __version__
from blip3o_rt.cli import convert, doctor, edit, generate
from blip3o_rt.errors import Blip3oError

FAILED = 2
INTERRUPTED = 130  # what a shell gives for a program ended by Ctrl-C


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 2 refused or failed, 130 interrupted."""
    try:
        arguments = build_parser().parse_args(argv)
        return int(arguments.run(arguments))
    except KeyboardInterrupt:
        print("blip3o-rt: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Blip3oError as error:
        print(f"blip3o-rt: error: {error}", file=sys.stderr)
        return FAILED
    except OSError as error:
        place = f"{error.filename}: " if error.filename is not None else ""
        print(f"blip3o-rt: error: {place}{error.strerror or error}", file=sys.stderr)
        return FAILED


def build_parser() -> argparse.ArgumentParser:
    """The command line's parser; `run` in its result is the command to call."""
    parser = argparse.ArgumentParser(
        prog="blip3o-rt",
        description="Draw and edit pictures with BLIP3o-NEXT: your checkpoint, or a small embedded one.",
    )
    parser.add_argument("--version", action="version", version=f"blip3o-rt {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    generate.add_parser(subparsers)
    edit.add_parser(subparsers)
    convert.add_parser(subparsers)
    doctor.add_parser(subparsers)
    return parser
