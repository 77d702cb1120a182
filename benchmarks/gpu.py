"""Everything that a GPU is asked for, in pieces of under ten minutes: build, suite, sanitizers, validation,
benchmarks, trace.

    python -m benchmarks.gpu                  run what is not done yet
    python -m benchmarks.gpu --within 570     only what fits in so many seconds
    python -m benchmarks.gpu --archive DIR    and pack the results into one file there, after every piece
    python -m benchmarks.gpu --dry-run        check on any machine that every piece could run
    python -m benchmarks.gpu --take FILE      put what another machine sent back into benchmarks/results

Results go to benchmarks/results/GPU/, with a state file that says which pieces are done: a finished piece is
not run again unless forced, or unless it is a check and the code is at another commit.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks import pieces
from benchmarks.dry_run import check
from benchmarks.pieces import EXPECTED, PIECES, Piece, Site, find_gpu
from benchmarks.targets import newest_rows, read_records, slower_than, standings
from blip3o_rt.measure.provenance import commit

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
STATE = "state.json"
ARCHIVE_BYTES = 15 * 2**20  # so that it is easily sent
DONE, FAILED, OVER_BUDGET, LEFT_OUT = "done", "failed", "over its budget", "left out"


class State:
    """What became of each piece on one GPU, saved after every change."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / STATE
        self.pieces: dict[str, dict[str, Any]] = {}
        if self.path.is_file():
            self.pieces = json.loads(self.path.read_text(encoding="utf-8"))

    def done(self, piece: Piece) -> bool:
        """Whether it ended well; a check, at this commit (that results make a checkout dirty matters not)."""
        entry = self.pieces.get(piece.name, {})
        at, here = ((of or "").removesuffix("-dirty") for of in (entry.get("commit"), commit()))
        return bool(entry.get("outcome") == DONE) and (not piece.checks or at == here)

    def set(self, name: str, outcome: str, **facts: Any) -> None:
        self.pieces[name] = {
            "outcome": outcome,
            "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": commit(),
            **facts,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".part")
        partial.write_text(json.dumps(self.pieces, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.path)


class Runner:
    """Runs pieces on a site.

    within: seconds for all of them, None is no limit. archive: folder that the results are also packed into.
    """

    def __init__(
        self, site: Site, *, force: bool = False, within: float | None = None, archive: Path | None = None
    ) -> None:
        self.site, self.force, self.archive = site, force, archive
        self.results = site.root / site.results
        self.state = State(self.results)
        self.end = float("inf") if within is None else time.monotonic() + within
        self.tried: set[str] = set()

    def run(self, wanted: Sequence[Piece]) -> bool:
        """Run them in order, each after what it needs; whether all that were not left out are done."""
        for piece in wanted:
            self.piece(piece)
        return all(self.settled(piece) for piece in wanted)

    def settled(self, piece: Piece) -> bool:
        """Whether there is nothing more to do for a piece."""
        if piece.left_out(self.site) is not None and piece.ready is None:
            return True
        return piece.ready(self.site) if piece.ready else self.state.done(piece)

    def piece(self, piece: Piece) -> None:
        """Run one piece unless it is done, cannot run, or does not fit in the time left."""
        if piece.name in self.tried:
            return
        self.tried.add(piece.name)
        if self.settled(piece) and not (self.force and piece.ready is None):
            self.say(piece, DONE if piece.ready else piece.left_out(self.site) or DONE)
            return
        if (reason := piece.left_out(self.site)) is not None:
            self.state.set(piece.name, LEFT_OUT, reason=reason)
            self.say(piece, reason)
            return
        for name in piece.needs:
            self.piece(pieces.named(name))
        undone = [name for name in piece.needs if not self.usable(pieces.named(name))]
        if undone:
            self.say(piece, f"not run: {', '.join(undone)} is not done")
        elif time.monotonic() + piece.budget > self.end:
            self.say(piece, f"not run: its {piece.budget} s do not fit in the time left")
        else:
            self.start(piece)
        self.pack()

    def usable(self, piece: Piece) -> bool:
        """Whether what needs a piece can run: packages that cannot be installed may be there all the same."""
        if piece.left_out(self.site) is not None:
            return piece.ready is None or piece.ready(self.site)
        return self.settled(piece)

    def start(self, piece: Piece) -> None:
        command = piece.command(self.site)
        self.say(piece, f"at most {piece.budget} s: {shlex.join(command)}")
        log = self.results / "logs" / f"{piece.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        begin = time.monotonic()
        environment = {**self.site.environment(), **piece.environment}
        code = run_within(command, self.site.root, environment, log, piece.budget)
        seconds = round(time.monotonic() - begin, 1)
        outcome = OVER_BUDGET if code is None else DONE if code == 0 else FAILED
        words = ["python" if word == self.site.python else word for word in command]
        self.state.set(piece.name, outcome, seconds=seconds, exit_code=code, command=words)
        self.say(piece, f"{outcome} after {seconds:.0f} s")
        if outcome != DONE:
            print("\n".join(f"  {line}" for line in last_lines(log)), flush=True)

    def pack(self) -> None:
        """All results in one archive, where that is asked for."""
        if self.archive is not None and self.results.is_dir():
            self.archive.mkdir(parents=True, exist_ok=True)
            for name in pack(self.results, self.archive / f"{self.results.name}.tar.gz"):
                print(f"{name} does not fit in the archive", flush=True)

    @staticmethod
    def say(piece: Piece, text: str) -> None:
        print(f"{piece.name}: {text}", flush=True)


def run_within(
    command: Sequence[str], folder: Path, environment: dict[str, str], log: Path, seconds: float
) -> int | None:
    """The exit code of a command whose output goes to a log; None where it was ended after so many seconds.

    It runs in a process group of its own, all of which is ended: first asked, so that a bench keeps what it
    has, then killed.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=output, start_new_session=True
        )
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                end(process)


def end(process: subprocess.Popen[bytes], patience: float = 20.0) -> None:
    """Interrupt a process group as Ctrl-C does, and kill what is left of it."""
    for kind in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, kind)
            process.wait(timeout=patience)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def last_lines(log: Path, count: int = 15) -> list[str]:
    return log.read_text(encoding="utf-8", errors="replace").splitlines()[-count:]


def pack(folder: Path, archive: Path, limit: int = ARCHIVE_BYTES) -> list[str]:
    """Write a folder's files to an archive of at most so many bytes, the small ones first; names left out."""
    files = sorted(
        (path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    partial = archive.with_suffix(".part")
    left_out = []
    with partial.open("wb") as output, tarfile.open(fileobj=output, mode="w:gz") as packed:
        for path in files:
            output.flush()
            if output.tell() + path.stat().st_size > limit:
                left_out.append(str(path.relative_to(folder)))
            else:
                packed.add(path, Path(folder.name) / path.relative_to(folder))
    partial.replace(archive)
    return left_out


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


def shortfalls(site: Site, gpu_name: str | None) -> str:
    """What the records say about the targets of a GPU (None: of any), and where a peer is faster."""
    records = read_records(site.root / site.results, "bench")
    found = standings(records, gpu_name, "cuda")
    body = [[s.target.label, s.target.bound, s.target.text(s.value), s.word] for s in found]
    table = tabulate(body, ["target", "wanted", "measured", ""], disable_numparse=True)
    return "\n".join([table, *(f"slower: {line}" for line in slower_than(newest_rows(records)))])


def outcomes(state: State) -> str:
    """The state as a table."""
    body = []
    for piece in PIECES:
        entry = state.pieces.get(piece.name, {})
        seconds = entry.get("seconds")
        took = f"{seconds:.0f} s" if seconds is not None else ""
        facts = [entry.get("outcome", ""), took, entry.get("commit") or ""]
        body.append([piece.name, *facts, entry.get("reason", piece.what)])
    return tabulate(body, ["piece", "outcome", "took", "commit", ""], disable_numparse=True)


def build_parser() -> argparse.ArgumentParser:
    description, _, details = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=description,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument(
        "--list", action="store_true", help="the pieces, what became of them and at which commit"
    )
    action.add_argument(
        "--dry-run", action="store_true", help="run nothing; check that every piece could run"
    )
    action.add_argument("--take", type=Path, metavar="FILE", help="unpack an archive that came back")
    parser.add_argument("--only", metavar="PIECE,...", help="these pieces, after what they need")
    parser.add_argument("--force", action="store_true", help="run finished pieces again")
    parser.add_argument(
        "--within",
        type=float,
        metavar="SECONDS",
        help="start no piece that may take longer, all together (no limit)",
    )
    parser.add_argument(
        "--archive", type=Path, metavar="DIR", help="pack the results into DIR/GPU.tar.gz after every piece"
    )
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="checkpoints and packages (build/gpu; 30 GB of disk)"
    )
    parser.add_argument(
        "--wheels", type=Path, metavar="DIR", help="wheels to install, for a machine without a network"
    )
    parser.add_argument(
        "--reference", type=Path, metavar="DIR", help="recorded runs t2i/ and edit/ (BLIP3O_REFERENCE)"
    )
    parser.add_argument(
        "--there",
        type=Path,
        metavar="FILE",
        help="with --dry-run: names of the packages that the machine has, to check the wheels against",
    )
    return parser


def chosen(text: str | None) -> list[Piece]:
    """The pieces of --only, in their order; all without it."""
    if text is None:
        return list(PIECES)
    names = [name.strip() for name in text.split(",") if name.strip()]
    known = [piece.name for piece in PIECES]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise SystemExit(f"--only is {text}: accepted are {', '.join(known)}, joined by commas")
    return [piece for piece in PIECES if piece.name in names]


def site(arguments: argparse.Namespace, gpu: pieces.Gpu) -> Site:
    """Where the options say."""
    environment = os.environ.get("BLIP3O_REFERENCE")
    reference = arguments.reference or (Path(environment) if environment else None)
    return Site(
        root=ROOT,
        results=(RESULTS / gpu.folder).relative_to(ROOT),
        work=in_checkout(arguments.work or ROOT / "build" / "gpu"),
        gpu=gpu,
        wheels=in_checkout(arguments.wheels) if arguments.wheels else None,
        reference=in_checkout(reference) if reference else None,
    )


def in_checkout(path: Path) -> Path:
    """A path as commands in the checkout name it."""
    found = path.resolve()
    return found.relative_to(ROOT) if found.is_relative_to(ROOT) else found


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 all pieces are done or left out, 1 some are not, 2 there is no GPU."""
    arguments = build_parser().parse_args(argv)
    wanted = chosen(arguments.only)
    if arguments.take is not None:
        print(f"{take(arguments.take, RESULTS)}: now python -m benchmarks.render")
        return 0
    gpu = find_gpu()
    if arguments.dry_run:
        here = site(arguments, gpu or EXPECTED)
        code = check(here, wanted, arguments.there, arguments.within)
        print(f"\n{shortfalls(here, gpu.name if gpu else None)}")
        return code
    if gpu is None and not arguments.list:
        print("no GPU that PyTorch can use: --dry-run checks the pieces without one", file=sys.stderr)
        return 2
    here = site(arguments, gpu or EXPECTED)
    if arguments.list:
        print(outcomes(State(ROOT / here.results)))
        return 0
    runner = Runner(here, force=arguments.force, within=arguments.within, archive=arguments.archive)
    complete = runner.run(wanted)
    runner.pack()
    print(f"\n{outcomes(runner.state)}\n\n{shortfalls(here, here.gpu.name)}")
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
