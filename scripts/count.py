"""Prints the size of the package, its import cycles and forbidden imports; exits with 1 where one is found.

Run from anywhere: `python scripts/count.py`.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "blip3o_rt"
MEASURE = f"{PACKAGE}.measure"
ABOVE = (
    MEASURE,
    f"{PACKAGE}.serve",
    f"{PACKAGE}.scale",
)  # what stands on the runtime and is not counted as it
# Rooms that came after the aims below were set, and the commands of every room beside the core.
LATER = tuple(f"{PACKAGE}.{name}" for name in ("serve", "scale", "rl"))
COMMANDS = tuple(
    f"{PACKAGE}.cli.{name}"
    for name in ("serve", "batch", "bench", "bench_serve", "bench_windows", "score", "validate")
)
STAGES = ("ar", "connector", "dit", "vae", "tatok")
# Ratchets: lowered as the code shrinks. The aims are 11,000 lines of the core, 10,000 lines and 16 files.
RUNTIME_LINES, MEASURE_LINES, ROOT_FILES = 16_462, 12_956, 16

Imports = dict[str, set[str]]  # a module -> the modules of the package that it imports


def name_of(path: Path) -> str:
    """The dotted name of a module's file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_below(name: str, *packages: str) -> bool:
    """Whether a module is one of the packages or inside one."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def import_statements(node: ast.AST, in_functions: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """The import statements below a node, without those for type checkers."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        elif in_functions or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from import_statements(child, in_functions)


def imported(path: Path, modules: Iterable[str], *, in_functions: bool) -> set[str]:
    """The modules below the package that a file imports, at its top level or in its functions too."""
    known, here = set(modules), name_of(path)
    package = here if path.name == "__init__.py" else here.rpartition(".")[0]
    found: set[str] = set()
    for statement in import_statements(ast.parse(path.read_text(encoding="utf-8")), in_functions):
        if isinstance(statement, ast.Import):
            found |= {alias.name for alias in statement.names}
            continue
        base = package.split(".")[: len(package.split(".")) - statement.level + 1] if statement.level else []
        source = ".".join([*base, *([statement.module] if statement.module else [])])
        members = {f"{source}.{alias.name}" for alias in statement.names}
        found |= (members & known) or {source}
    return (found & known) - {here, PACKAGE}  # which imports the pipeline when that is asked for


def cycles(imports: Imports) -> list[list[str]]:
    """The groups of modules that import each other, by Tarjan's strongly connected components."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(imports[name]):
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            group = [stack.pop()]
            while group[-1] != name:
                group.append(stack.pop())
            if len(group) > 1:
                found.append(sorted(group))

    for name in sorted(imports):
        if name not in index:
            visit(name)
    return found


def crossings(imports: Imports, fenced: Callable[[str, str], bool]) -> list[str]:
    """The imports that a rule forbids, as "module imports module"."""
    pairs = [(name, other) for name in sorted(imports) for other in sorted(imports[name])]
    return [f"{name} imports {other}" for name, other in pairs if fenced(name, other)]


def stage_of(name: str) -> str | None:
    return next((stage for stage in STAGES if is_below(name, f"{PACKAGE}.{stage}")), None)


def leaves_its_stage(name: str, other: str) -> bool:
    return stage_of(name) is not None and stage_of(other) not in (None, stage_of(name))


def enters_measure(name: str, other: str) -> bool:
    return is_below(other, MEASURE) and not is_below(name, MEASURE)


def knows_the_model(name: str, other: str) -> bool:
    above = [f"{PACKAGE}.{part}" for part in (*STAGES, "pipeline", "checkpoint", "cli")]
    return is_below(name, f"{PACKAGE}.ops") and is_below(other, *above)


def knows_the_runtime(name: str, other: str) -> bool:
    """Of the baselines, which may read where published configurations are: those are data."""
    baselines = f"{MEASURE}.baselines"
    return is_below(name, baselines) and not is_below(other, baselines, f"{PACKAGE}.checkpoint.source")


def rooms(names: dict[str, Path], lines: dict[str, int]) -> list[tuple[str, int]]:
    """The lines of the core of the runtime, without later rooms and their commands, then of every room."""
    core = sum(n for name, n in lines.items() if not is_below(name, MEASURE, *LATER, *COMMANDS))
    found: Counter[str] = Counter()
    for name, path in names.items():
        first, *below = path.relative_to(ROOT / PACKAGE).parts
        found[first if below else "the root"] += lines[name]
    return [("core of the runtime", core), *found.most_common()]


def main() -> int:
    """Print every count and rule; 1 where one is over its limit, else 0."""
    files = sorted((ROOT / PACKAGE).rglob("*.py"))
    names = {name_of(path): path for path in files}
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in names.items()}
    scripts = sum(
        len(p.read_text(encoding="utf-8").splitlines()) for p in (ROOT / "benchmarks").rglob("*.py")
    )
    imports = {name: imported(path, names, in_functions=True) for name, path in names.items()}
    at_import = {  # a command may import measuring code when it runs
        name: imported(path, names, in_functions=not is_below(name, f"{PACKAGE}.cli"))
        for name, path in names.items()
    }
    counts = [
        ("runtime lines", sum(n for name, n in lines.items() if not is_below(name, *ABOVE)), RUNTIME_LINES),
        (
            "measuring lines",
            scripts + sum(n for name, n in lines.items() if is_below(name, MEASURE)),
            MEASURE_LINES,
        ),
        ("files at the root", len(list((ROOT / PACKAGE).glob("*.py"))), ROOT_FILES),
    ]
    rules = {
        "import cycles": [", ".join(group) for group in cycles(imports)],
        "stages import no other stage": crossings(imports, leaves_its_stage),
        "the runtime imports no measuring code": crossings(at_import, enters_measure),
        "ops import nothing of the model": crossings(imports, knows_the_model),
        "the baselines import nothing of the runtime": crossings(imports, knows_the_runtime),
    }
    for title, count, limit in counts:
        print(f"{title:52} {count:6} of {limit}{'' if count <= limit else '  OVER'}")
    for room, count in rooms(names, lines):
        print(f"    {room:48} {count:6}")
    for title, found in rules.items():
        print(f"{title:52} {'BROKEN' if found else 'none' if 'cycles' in title else 'holds':>6}")
        for line in found:
            print(f"    {line}")
    return int(any(count > limit for _, count, limit in counts) or any(rules.values()))


if __name__ == "__main__":
    sys.exit(main())
