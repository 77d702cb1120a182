"""Who may import whom in the package, and that no import is circular, as scripts/count.py finds it."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import count
from tests.conftest import LONG_FILES, ROOT


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty package where the real one is looked for."""
    monkeypatch.setattr(count, "ROOT", tmp_path)
    return tmp_path / "blip3o_rt"


def write(tree: Path, **modules: str) -> None:
    """Modules by dotted names in which "__" stands for a dot."""
    for name, text in modules.items():
        path = tree.joinpath(*name.split("__")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_the_package_has_no_cycle_and_holds_its_walls(capsys: pytest.CaptureFixture[str]) -> None:
    count.main()
    assert "BROKEN" not in capsys.readouterr().out


def test_only_code_counts_as_code(tree: Path) -> None:
    text = '''"""A file
of this kind."""

# a remark
NAMES = (  # counted by its code
    "a",

    # a remark
    "b",
)
PROSE = """two
lines"""


class Kind:
    """What it is."""

    def method(self):
        """What it
        does."""
        f"{NAMES}"
'''
    write(tree, kinds=text)
    assert count.size_of(tree / "kinds.py") == count.Size(code=9, lines=text.count("\n"))


@pytest.mark.parametrize(
    ("rule", "module", "text"),
    [
        ("stages import no other stage", "ar__model", "from blip3o_rt.dit import model"),
        ("stages import no other stage", "ar__model", "def f():\n    import blip3o_rt.dit.model"),
        ("the runtime imports no measuring code", "pipeline", "from blip3o_rt.measure.bench import run"),
        ("the runtime imports no measuring code", "cli__bench", "import blip3o_rt.measure.bench.run"),
        ("ops import nothing of the model", "ops__linear", "from ..dit.model import DiT"),
        (
            "the baselines import nothing of the runtime",
            "measure__baselines__a",
            "from blip3o_rt import pipeline",
        ),
        (
            "import cycles",
            "dit__model",
            "from blip3o_rt import measure\nfrom blip3o_rt.measure.bench import run",
        ),
    ],
)
def test_what_breaks_a_rule_is_named(
    rule: str, module: str, text: str, tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tree, dit__model="", pipeline="", measure__bench__run="import blip3o_rt.dit.model")
    write(tree, cli__score="def run():\n    from blip3o_rt.measure.bench import run")
    assert count.main() == 0
    capsys.readouterr()
    write(tree, **{module: text})
    assert count.main() == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if "BROKEN" in line]
    assert [line.startswith(rule) for line in lines].count(True) == 1


def test_a_count_over_its_limit_fails(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tree, **{f"file_{number}": "" for number in range(count.ROOT_FILES + 1)})
    assert count.main() == 1
    assert f"{count.ROOT_FILES + 1} of {count.ROOT_FILES}  OVER" in capsys.readouterr().out


def test_the_long_files_that_the_suite_begins_with_exist() -> None:
    assert [name for name in LONG_FILES if not (ROOT / "tests" / name).is_file()] == []
