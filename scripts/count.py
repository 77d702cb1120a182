"""Prints the size of the package, its import cycles and forbidden imports; exits with 1 where one is found.

A line of code is one that is not blank, a comment or a docstring: explaining costs nothing here.
Run from anywhere: `python scripts/count.py`.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "blip3o_rt"
MEASURE = f"{PACKAGE}.measure"
ABOVE = (
    MEASURE,
    f"{PACKAGE}.serve",
    f"{PACKAGE}.scale",
)  # what stands on the runtime and is not counted as it
STAGES = ("ar", "connector", "dit", "vae", "tatok")
RUNTIME_CODE, MEASURE_CODE, ROOT_FILES = 10_996, 9_436, 16  # lowered as the code shrinks

Imports = dict[str, set[str]]  # a module -> the modules of the package that it imports
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
NOT_CODE = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
)


@dataclass(frozen=True)
class Size:
    """Lines of files: of code, and all."""

    code: int = 0
    lines: int = 0

    def __add__(self, other: Size) -> Size:
        return Size(self.code + other.code, self.lines + other.lines)


def size_of(path: Path) -> Size:
    """How long a file of Python is."""
    text = path.read_text(encoding="utf-8")
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NOT_CODE:
            code |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            code -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return Size(len(code), len(text.splitlines()))


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


def total(sizes: Iterable[Size]) -> Size:
    return sum(sizes, Size())


def rooms(names: dict[str, Path], sizes: dict[str, Size]) -> list[tuple[str, Size]]:
    """Every room, the largest first."""
    found: defaultdict[str, Size] = defaultdict(Size)
    for name, path in names.items():
        first, *below = path.relative_to(ROOT / PACKAGE).parts
        found[first if below else "the root"] += sizes[name]
    return sorted(found.items(), key=lambda room: -room[1].code)


def main() -> int:
    """Print every count and rule; 1 where one is over its limit, else 0."""
    files = sorted((ROOT / PACKAGE).rglob("*.py"))
    names = {name_of(path): path for path in files}
    sizes = {name: size_of(path) for name, path in names.items()}
    runtime = total(size for name, size in sizes.items() if not is_below(name, *ABOVE))
    measure = total(size for name, size in sizes.items() if is_below(name, MEASURE))
    measure += total(map(size_of, (ROOT / "benchmarks").rglob("*.py")))
    imports = {name: imported(path, names, in_functions=True) for name, path in names.items()}
    at_import = {  # a command may import measuring code when it runs
        name: imported(path, names, in_functions=not is_below(name, f"{PACKAGE}.cli"))
        for name, path in names.items()
    }
    counts = [
        (f"code of the runtime ({runtime.lines:,} lines in all)", runtime.code, RUNTIME_CODE),
        (f"code that measures ({measure.lines:,} lines in all)", measure.code, MEASURE_CODE),
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
    for room, size in rooms(names, sizes):
        print(f"    {room:48} {size.code:6} ({size.lines:,} in all)")
    for title, found in rules.items():
        print(f"{title:52} {'BROKEN' if found else 'none' if 'cycles' in title else 'holds':>6}")
        for line in found:
            print(f"    {line}")
    return int(any(count > limit for _, count, limit in counts) or any(rules.values()))


if __name__ == "__main__":
    sys.exit(main())
