"""The commands of blip3o-rt, its parser, and what becomes of errors."""

from __future__ import annotations

import argparse
import errno
import io
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from traceback import walk_tb
from typing import Any, NoReturn

from blip3o_rt import __version__
from blip3o_rt.cli import batch, bench, convert, doctor, edit, generate, score, serve, validate
from blip3o_rt.cli.like import like_defaults
from blip3o_rt.cli.options import add_command
from blip3o_rt.errors import Blip3oError, Blip3oWarning, ParameterError, shown

FAILED = 2
BROKEN_PIPE = 141  # what a shell gives for a program whose reader has gone, as in `doctor | head -1`

# What OpenMP takes. It answers anything else by lines of its own, an endless loop or the end of the process.
OPENMP = {
    "OMP_NUM_THREADS": r"[1-9]\d{0,2}(\s*,\s*[1-9]\d{0,2})*",  # one for each level
    "OMP_THREAD_LIMIT": r"[1-9]\d{0,2}",
    "GOMP_CPU_AFFINITY": r"[\d\s,:-]+",
    "OMP_PLACES": r"(threads|cores|sockets|ll_caches|numa_domains)(\s*\(\s*\d+\s*\))?|[\d\s,:{}!-]+",
    "OMP_PROC_BIND": r"(true|false|(master|primary|close|spread)(\s*,\s*(master|primary|close|spread))*)",
    "OMP_DYNAMIC": "true|false",
    "OMP_WAIT_POLICY": "active|passive",
    "OMP_STACKSIZE": r"\d+\s*[bkmg]?",
    "OMP_SCHEDULE": r"((non)?monotonic\s*:\s*)?(static|dynamic|guided|auto)(\s*,\s*\d+)?",
}

# Where PyTorch reports memory that is not there by a plain RuntimeError: the CPU allocator, cuBLAS and CUDA.
OUT_OF_MEMORY_PHRASES = ("can't allocate memory", "not enough memory", "ALLOC_FAILED", "out of memory")


def run_safely(argv: Sequence[str] | None = None) -> int:
    """Run one command; what goes wrong becomes one line on standard error and an exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that it cannot encode is escaped
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those of the libraries
            warnings.simplefilter("always", Blip3oWarning)
            warnings.showwarning = print_warning
            return run(argv)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to be flushed
        return BROKEN_PIPE
    except Blip3oError as error:
        return failed(str(error))
    except OSError as error:
        output = "standard output" if error.errno == errno.ENOSPC else None  # files are named
        place = output if error.filename is None else error.filename
        return failed(f"{'' if place is None else f'{place}: '}{error.strerror or error}")
    except Exception as error:
        message = machine_failure(error) or library_failure(error)
        if message is None:
            raise
        return failed(message)


def run(argv: Sequence[str] | None) -> int:
    """Parse and run one command, and flush what it printed where errors are still caught."""
    check_current_folder()
    ignored = ignore_for_openmp()
    try:
        arguments = parse(sys.argv[1:] if argv is None else argv)
        if getattr(arguments, "quiet", False):
            warnings.simplefilter("ignore")
        for line in ignored:
            warnings.warn(line, Blip3oWarning, stacklevel=2)
        return int(arguments.run(arguments))
    finally:
        print(end="", flush=True)


def check_current_folder() -> None:
    """Raise ParameterError where the current folder was removed: MKL ends a process that is in none."""
    try:
        Path.cwd()
    except OSError:
        raise ParameterError("the current folder is not there any more: change to another") from None


def ignore_for_openmp() -> list[str]:
    """Drop variables that OpenMP does not take, before PyTorch is imported and it reads them; says which."""
    found = {name: text for name in OPENMP if (text := os.environ.get(name)) is not None}
    flags = re.ASCII | re.IGNORECASE
    wrong = {n: text for n, text in found.items() if not re.fullmatch(OPENMP[n], text.strip(), flags)}
    for name in wrong:
        del os.environ[name]
    return [
        f"{n} is {shown(text)}, which OpenMP does not take: it is ignored"
        for n, text in wrong.items()
        if text
    ]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of one command; `run` among them is the function to call. Raises ParameterError.

    --like FILE makes what the file says the defaults.
    """
    parser = build_parser()
    command = parser.commands.get(argv[0]) if argv else None
    if command is None or command.get_default("task") is None:
        return parser.parse_args(argv)
    # Options may stand between prompts, unless -- says where options end.
    read = command.parse_args if "--" in argv else command.parse_intermixed_args
    arguments = read(argv[1:])
    if arguments.like is not None:
        command.set_defaults(**like_defaults(arguments.like, arguments.task))
        arguments = read(argv[1:])
    return arguments


def print_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Print a warning as one line, in place of warnings.showwarning."""
    print(f"blip3o-rt: warning: {message}", file=sys.stderr)


def failed(message: str) -> int:
    """Print why the command failed; returns the exit code."""
    print(f"blip3o-rt: error: {' '.join(message.splitlines())}", file=sys.stderr)
    return FAILED


def library_failure(error: Exception) -> str | None:
    """One line for a library that is not there or fails as it is imported; None for any other error."""
    bodies = [f.f_globals for f, _ in walk_tb(error.__traceback__) if f.f_code.co_name == "<module>"]
    names = [str(body.get("__name__", "")) for body in bodies]
    if isinstance(error, ImportError):
        names.append(error.name or "")
    packages = [name.partition(".")[0] for name in names]
    package = next((name for name in packages if name not in ("", "__main__", "blip3o_rt")), None)
    if package is None:
        return None
    reason = " ".join(str(error).split()) or type(error).__name__
    return (
        f"{package} cannot be imported ({reason:.300}): install it again, or mend what the environment says"
    )


def machine_failure(error: Exception) -> str | None:
    """One line for memory that ran out or a GPU that failed; None for an error of any other kind."""
    if not isinstance(error, MemoryError | RuntimeError):
        return None
    torch = sys.modules.get("torch")  # what has not been imported has raised nothing
    detail = next(iter(str(error).splitlines()), "")
    memory_errors = (MemoryError, *([torch.OutOfMemoryError] if torch else []))
    if isinstance(error, memory_errors) or any(phrase in str(error) for phrase in OUT_OF_MEMORY_PHRASES):
        remedy = "a smaller --max-batch or --max-prompt-tokens, --dtype bf16 or a machine with more may do"
        return f"out of memory{f' ({detail})' if detail else ''}: {remedy}"
    if torch is not None and isinstance(error, getattr(torch, "AcceleratorError", ())):
        return f"the GPU failed ({detail}): try again, or choose --device cpu"
    return None


class Parser(argparse.ArgumentParser):
    """An argument parser that refuses as everything else here does; its subparsers are of the same class."""

    commands: dict[str, Parser]

    def error(self, message: str) -> NoReturn:
        """Raise ParameterError, one line."""
        raise ParameterError(f"{' '.join(message.split())} (see {self.prog} --help)")


def build_parser() -> Parser:
    """The command line's parser; `run` in its result is the command to call. Raises ParameterError."""
    parser = Parser(
        prog="blip3o-rt",
        description="Draw and edit images with BLIP3o-NEXT: your checkpoint, or a small embedded one.",
    )
    parser.add_argument("--version", action="version", version=f"blip3o-rt {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    parser.commands = subparsers.choices
    for command in (generate, edit, batch, convert, bench, serve, score, validate, doctor):
        add_command(subparsers, command.__name__.rpartition(".")[2], command)
    return parser
