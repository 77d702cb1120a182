"""A walk through the pieces of a GPU run without a GPU: is every command, file and package there?"""

from __future__ import annotations

import re
import shlex
import zipfile
from collections.abc import Sequence
from email.parser import Parser
from pathlib import Path

from benchmarks.pieces import CALL_SECONDS, LONGEST, PACKAGES, Piece, Site, missing_packages
from blip3o_rt.cli.commands import build_parser
from blip3o_rt.errors import Blip3oError

MODULE = "blip3o_rt"


def check(site: Site, wanted: Sequence[Piece], there: Path | None, within: float | None) -> int:
    """Print every piece and what is wrong with it; 1 where something is."""
    problems = packages_problems(site, there)
    for problem in problems:
        print(f"PROBLEM: {problem}")
    for piece in wanted:
        command = piece.command(site)
        print(f"{piece.name} (at most {piece.budget} s): {piece.what}")
        print(f"  {shlex.join(command)}")
        if (reason := piece.left_out(site)) is not None:
            print(f"  left out: {reason}")
            continue
        if piece.tools:
            print(f"  calls there: {', '.join(piece.tools)}")
        for problem in piece_problems(site, piece, command):
            print(f"  PROBLEM: {problem}")
            problems.append(problem)
    print(budget_text(site, wanted, within or CALL_SECONDS))
    print(f"{len(problems)} problem{'' if len(problems) == 1 else 's'}")
    return 1 if problems else 0


def piece_problems(site: Site, piece: Piece, command: Sequence[str]) -> list[str]:
    """What would keep a piece from running, as far as it can be seen from here."""
    found = []
    if piece.budget >= LONGEST:
        found.append(f"its budget of {piece.budget} s is not below {LONGEST} s")
    arguments = list(command)
    if site.python in arguments:
        arguments = arguments[arguments.index(site.python) + 1 :]
    if arguments[:2] == ["-m", MODULE]:
        found += command_line_problems(arguments[2:])
    files = [a for a in arguments if re.match(r"tests(/|$)|setup\.py$", a)]
    found += [f"{file} is not in the checkout" for file in files if not (site.root / file).exists()]
    if piece.name.startswith("validate-golden") and site.reference is not None:
        folder = site.root / site.reference / piece.name.rpartition("-")[2]
        needed = ("checkpoint", "golden.safetensors")
        found += [f"{folder / name} is missing" for name in needed if not (folder / name).exists()]
    return found


def command_line_problems(arguments: Sequence[str]) -> list[str]:
    """Whether blip3o-rt takes these arguments, by its own parser."""
    try:
        build_parser().parse_args(list(arguments))
    except (Blip3oError, SystemExit) as error:
        return [f"blip3o-rt does not take this: {error}"]
    return []


def packages_problems(site: Site, there: Path | None) -> list[str]:
    """Packages that the machine will lack: by a list of what it has, or else by what is here."""
    found = []
    folder = site.root / site.wheels if site.wheels else None
    carried = wheels(folder) if folder else {}
    if folder:
        size = sum(path.stat().st_size for path in folder.glob("*.whl")) / 2**20
        print(f"carried: {', '.join(sorted(carried)) or 'nothing'} ({size:.1f} MiB)")
        found += [f"{folder} has {len(v)} wheels of {n}: keep one" for n, v in carried.items() if len(v) > 1]
    if there is None:
        missing = [canonical(name) for name in missing_packages(site)]
    else:
        present = {canonical(name) for name in re.split(r"[\s,]+", there.read_text(encoding="utf-8")) if name}
        missing = [canonical(name) for name in PACKAGES.values() if canonical(name) not in present]
    lacking = [name for name in missing if name not in carried]
    return [*found, *(f"package {name} is neither there nor carried" for name in lacking)]


def wheels(folder: Path) -> dict[str, list[Path]]:
    """Distribution -> its wheels in a folder."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(path) as archive:
            metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
            name = Parser().parsestr(archive.read(metadata).decode("utf-8"))["Name"]
        found.setdefault(canonical(name), []).append(path)
    return found


def canonical(name: str) -> str:
    """A distribution's name as registries compare it, without a version."""
    return re.sub(r"[-_.]+", "-", re.split(r"[=<>~!\[]", name)[0].strip(".")).lower()


def budget_text(site: Site, wanted: Sequence[Piece], within: float) -> str:
    """All budgets together, and how many commands they take where each has so many seconds."""
    run = [piece for piece in wanted if piece.left_out(site) is None]
    total = sum(piece.budget for piece in run)
    calls: list[list[Piece]] = []
    for piece in run:
        if not calls or sum(p.budget for p in calls[-1]) + piece.budget > within:
            calls.append([])
        calls[-1].append(piece)
    counted = f"{len(run)} piece{'' if len(run) == 1 else 's'}"
    minutes = f"{total / 60:.0f} minutes"
    lines = [f"{counted}, at most {total} s ({minutes}); in commands of {within:.0f} s:"]
    for number, call in enumerate(calls, 1):
        lines.append(f"  {number}. {', '.join(p.name for p in call)} ({sum(p.budget for p in call)} s)")
    return "\n".join(lines)
