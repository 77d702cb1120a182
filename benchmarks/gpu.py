"""Numbers from a GPU in eight minutes, with nothing installed and no network.

    python3 -m benchmarks.gpu --seconds 480            build, check, measure; pack everything into --out
    python3 -m benchmarks.gpu --seconds 200 --second   compiled baselines, and what the first call left undone
    python -m benchmarks.gpu --dry-run --seconds 480   on any machine: would all that matters fit?
    python -m benchmarks.gpu --take results.tar.gz     unpack what came back into benchmarks/results

Pieces run in order, each within its seconds. One that would take the time of an essential piece is left out.
Results are packed after every piece. Only one GPU is used.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from benchmarks.pieces import BUILD_PACKAGES, PACKAGES, PIECES, ROOT, Piece, Site, missing

RESULTS = ROOT / "benchmarks" / "results"
STATE = "state.json"
PACKING = 15.0  # seconds kept for the last packing
GRACE = 4.0  # of a piece's seconds, to write what it has after it was interrupted
DONE, FAILED, CUT, LEFT_OUT = "done", "failed", "cut short", "left out: no time"


class Clock(Protocol):
    def __call__(self) -> float: ...


class Run:
    """Runs pieces one after the other until the seconds are over.

    Args:
        execute: runs a piece for so many seconds; returns its outcome.
        clock: what the seconds are counted by.
    """

    def __init__(
        self,
        site: Site,
        seconds: float,
        execute: Callable[[Piece, float], str],
        clock: Clock = time.monotonic,
    ) -> None:
        self.site, self.execute, self.clock = site, execute, clock
        self.begin = clock()
        self.end = self.begin + seconds - PACKING
        self.state: dict[str, dict[str, Any]] = {}
        path = site.results / STATE
        if path.is_file():
            self.state = json.loads(path.read_text(encoding="utf-8"))

    def all(self, pieces: Sequence[Piece]) -> None:
        """Every piece that fits beside the essential ones after it."""
        for place, piece in enumerate(pieces):
            kept = sum(later.seconds for later in pieces[place + 1 :] if later.essential)
            if self.clock() + piece.seconds + (0 if piece.essential else kept) > self.end:
                self.note(piece, LEFT_OUT)
                continue
            began = self.clock()
            outcome = self.execute(piece, piece.seconds)
            self.note(piece, outcome, seconds=round(self.clock() - began, 1))

    def note(self, piece: Piece, outcome: str, **facts: Any) -> None:
        """Print and keep what became of a piece."""
        at = self.clock() - self.begin
        print(f"{at:5.0f} s  {piece.name}: {outcome}", flush=True)
        self.state[piece.name] = {"outcome": outcome, **facts}
        if self.site.results.is_dir():
            (self.site.results / STATE).write_text(json.dumps(self.state, indent=1) + "\n", encoding="utf-8")

    def undone(self) -> list[Piece]:
        """Pieces of the first call that have not ended well."""
        return [p for p in PIECES if p.call == 1 and self.state.get(p.name, {}).get("outcome") != DONE]


def execute(site: Site, out: Path) -> Callable[[Piece, float], str]:
    """Runs a piece's command in a process group of its own; then packs the results."""

    def run(piece: Piece, seconds: float) -> str:
        command = piece.command(site)
        print(f"        {shlex.join(command)}", flush=True)
        log = site.results / f"{piece.name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=site.environment(),
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
            outcome = wait(process, seconds)
        if outcome != DONE:
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
            print("\n".join(f"        {line}" for line in lines[-8:]), flush=True)
        pack(site, out)
        return outcome

    return run


def wait(process: subprocess.Popen[bytes], seconds: float) -> str:
    """The outcome of a process that has so many seconds.

    It is interrupted as Ctrl-C does, so that it keeps what it has, and then killed with its children.
    """
    try:
        return DONE if process.wait(timeout=max(0.1, seconds - GRACE)) == 0 else FAILED
    except subprocess.TimeoutExpired:
        for kind in (signal.SIGINT, signal.SIGKILL):
            try:
                os.killpg(process.pid, kind)
                process.wait(timeout=GRACE)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue
        return CUT


def pack(site: Site, out: Path) -> None:
    """The results in one archive, and the built module beside it."""
    out.mkdir(parents=True, exist_ok=True)
    partial = out / "results.part"
    with tarfile.open(partial, mode="w:gz") as packed:
        packed.add(site.results, site.results.name)
    partial.replace(out / "results.tar.gz")
    for module in (ROOT / "blip3o_rt").glob("_cuda*.so"):
        shutil.copy2(module, out / module.name)


def take(archive: Path, results: Path) -> Path:
    """Unpack what `pack` packed below the results; returns the folder."""
    with tarfile.open(archive) as packed:
        top = {Path(name).parts[0] for name in packed.getnames()}
        if len(top) != 1:
            raise SystemExit(
                f"{archive} holds {len(top)} folders: accepted is an archive of one GPU's results"
            )
        safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # not in every 3.10 and 3.11
        packed.extractall(results, **safely)
    return results / top.pop()


def unpack_wheels(wheels: Path, folder: Path) -> None:
    """Carried packages, of Python alone, without pip."""
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)


# Without a GPU


def dry_run(pieces: Sequence[Piece], seconds: float) -> int:
    """Walk through the pieces with a clock that takes each at its budget; 1 where something would not do."""
    site = Site(Path("results"), Path("work"))
    problems = [problem for piece in pieces for problem in command_problems(piece.command(site))]
    now = 0.0

    def take_all(piece: Piece, allowed: float) -> str:
        nonlocal now
        now += allowed
        return DONE

    run = Run(site, seconds, take_all, clock=lambda: now)
    run.all(pieces)
    for piece in pieces:
        if piece.essential and run.state[piece.name]["outcome"] != DONE:
            problems.append(f"{piece.name} does not fit in {seconds:.0f} s")
    print(f"{now + PACKING:5.0f} s  packed")
    for problem in problems:
        print(f"PROBLEM: {problem}")
    return 1 if problems else 0


def command_problems(command: Sequence[str]) -> list[str]:
    """Whether blip3o-rt takes its arguments, by its own parser, and files of tests are there."""
    from blip3o_rt.cli.commands import build_parser
    from blip3o_rt.errors import Blip3oError

    found = [
        f"{word} is not in the checkout"
        for word in command
        if word.startswith("tests/") and not (ROOT / word).exists()
    ]
    if "blip3o_rt" in command:
        arguments = list(command[command.index("blip3o_rt") + 1 :])
        try:
            build_parser().parse_args(arguments)
        except (Blip3oError, SystemExit) as error:
            found.append(f"blip3o-rt does not take {shlex.join(arguments)}: {error}")
    return found


# The command


def build_parser() -> argparse.ArgumentParser:
    description, _, details = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=description,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=480.0, help="of everything (%(default)s)")
    parser.add_argument("--second", action="store_true", help="the second call")
    parser.add_argument("--only", metavar="PIECE,...", help="these pieces, as if all were essential")
    action = parser.add_mutually_exclusive_group()
    action.add_argument(
        "--dry-run", action="store_true", help="run nothing; fail where what matters does not fit"
    )
    action.add_argument("--ready", action="store_true", help="0 where this Python needs no more packages")
    action.add_argument("--take", type=Path, metavar="FILE", help="unpack an archive that came back")
    out = Path(os.environ.get("OUT", "out/gpu"))
    parser.add_argument(
        "--out", type=Path, default=out, metavar="DIR", help="archive goes here ($OUT, out/gpu)"
    )
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build" / "gpu", metavar="DIR", help="(build/gpu)"
    )
    parser.add_argument(
        "--wheels", type=Path, metavar="DIR", help="carried wheels of pure Python, as diffusers"
    )
    return parser


def chosen(arguments: argparse.Namespace, run: Run | None = None) -> list[Piece]:
    """The pieces of a call: the second one builds again, and ends with what the first left undone."""
    if arguments.only is not None:
        names = [name.strip() for name in arguments.only.split(",")]
        unknown = set(names).difference(piece.name for piece in PIECES)
        if unknown:
            accepted = ", ".join(piece.name for piece in PIECES)
            raise SystemExit(f"--only is {arguments.only}: accepted are {accepted}, joined by commas")
        return [piece for piece in PIECES if piece.name in names]
    if not arguments.second:
        return [piece for piece in PIECES if piece.call == 1]
    build = PIECES[0]
    undone = [piece for piece in run.undone() if piece is not build] if run is not None else []
    return [build, *(piece for piece in PIECES if piece.call == 2), *undone]


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 all pieces are done, 1 some are not, 2 there is no GPU or a package is missing."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's & turns off, for pieces too
    arguments = build_parser().parse_args(argv)
    if arguments.take is not None:
        print(f"{take(arguments.take, RESULTS)}: now python -m benchmarks.render")
        return 0
    if arguments.dry_run:
        return dry_run(chosen(arguments), arguments.seconds)
    lacking = missing((*PACKAGES, *BUILD_PACKAGES))
    if lacking or arguments.ready:
        print("missing packages: " + ", ".join(lacking) if lacking else "nothing is missing", file=sys.stderr)
        return 2 if lacking else 0
    import torch

    if not torch.cuda.is_available():
        print("no GPU that PyTorch can use: --dry-run walks through without one", file=sys.stderr)
        return 2
    name = torch.cuda.get_device_name(0)
    folder = "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
    work = arguments.work.resolve()
    site = Site(work / folder, work)
    if (RESULTS / folder).is_dir() and not site.results.exists():
        shutil.copytree(RESULTS / folder, site.results)  # what the first call brought back
    site.results.mkdir(parents=True, exist_ok=True)
    if arguments.wheels is not None:
        unpack_wheels(arguments.wheels, work / "packages")
    run = Run(site, arguments.seconds, execute(site, arguments.out.resolve()))
    pieces = chosen(arguments, run)
    run.all(pieces)
    pack(site, arguments.out.resolve())
    return 0 if all(run.state[piece.name]["outcome"] == DONE for piece in pieces) else 1


if __name__ == "__main__":
    sys.exit(main())
