"""The GPU run resumes, ends what takes too long and packs what it has; its dry run finds what is wrong."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import re
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import dry_run, gpu, pieces
from benchmarks.gpu import DONE, FAILED, LEFT_OUT, OVER_BUDGET, Runner, State
from benchmarks.pieces import EXPECTED, LONGEST, PIECES, Gpu, Piece, Site
from benchmarks.targets import targets
from blip3o_rt.measure.validate.checkpoint import converted_folder


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A site of its own, with everything below the temporary folder."""
    return Site(tmp_path, Path("results/a-gpu"), Path("work"), Gpu("A GPU", "90a-real"))


Install = Callable[..., list[Piece]]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Makes the given pieces the ones there are."""

    def replace(*found: Piece) -> list[Piece]:
        monkeypatch.setattr(pieces, "PIECES", found)
        monkeypatch.setattr(gpu, "PIECES", found)
        return list(found)

    return replace


def python(name: str, code: str, *, budget: int = 60, needs: tuple[str, ...] = (), **more: object) -> Piece:
    """A piece that runs Python code in the site's folder."""
    piece = Piece(name, f"what {name} does", budget, lambda site: [site.python, "-c", code], needs=needs)
    return dataclasses.replace(piece, **more)  # type: ignore[arg-type]


def mark(name: str) -> str:
    """Code that adds a line to a file."""
    return f"open('{name}.txt', 'a').write('ran\\n')"


def count(site: Site, name: str) -> int:
    path = site.root / f"{name}.txt"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_a_finished_piece_is_not_run_again_unless_forced(site: Site, install: Install) -> None:
    wanted = install(python("one", mark("one")), python("two", mark("two") + "; raise SystemExit(3)"))
    assert not Runner(site).run(wanted)
    assert not Runner(site).run(wanted)
    assert (count(site, "one"), count(site, "two")) == (1, 2)
    state = State(site.root / site.results).pieces
    assert (state["one"]["outcome"], state["two"]["outcome"]) == (DONE, FAILED)
    assert state["two"]["exit_code"] == 3
    assert state["one"]["command"][:2] == ["python", "-c"]
    assert Runner(site, force=True).run(wanted[:1])
    assert count(site, "one") == 2


def test_what_a_piece_needs_comes_first_and_stops_it_where_it_fails(site: Site, install: Install) -> None:
    failing = install(python("base", "raise SystemExit(1)"), python("top", mark("top"), needs=("base",)))
    assert not Runner(site).run(failing[1:])
    assert count(site, "top") == 0
    working = install(python("base", mark("base")), python("top", mark("top"), needs=("base",)))
    assert Runner(site).run(working[1:])
    assert (count(site, "base"), count(site, "top")) == (1, 1)


def test_a_machine_that_lacks_a_build_gets_it_again(site: Site, install: Install) -> None:
    """A piece that changes the machine is judged by the machine, not by the state that came along."""
    built = site.root / "built"
    piece = python("build", "open('built', 'w')", ready=lambda _: built.exists())
    wanted = install(piece, python("top", mark("top"), needs=("build",)))
    assert Runner(site).run(wanted)
    built.unlink()
    assert Runner(site, force=True).run(wanted[1:])
    assert built.exists()
    assert count(site, "top") == 2


GRANDCHILD = """
import fcntl, time
file = open("held", "w")
fcntl.flock(file, fcntl.LOCK_EX)
open("ready", "w")
time.sleep(3600)
"""
CHILD = f"""
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
print("began", flush=True)
try:
    subprocess.Popen([sys.executable, "-c", {GRANDCHILD!r}])
    time.sleep(3600)
except KeyboardInterrupt:
    open("kept", "w")
"""


class OverBudget(subprocess.Popen[bytes]):
    """A process whose budget is over as soon as its own child is ready, however long that takes."""

    def __init__(self, *arguments: Any, cwd: Path | None = None, **options: Any) -> None:
        self.ready, self.over = Path(cwd or "", "ready"), False
        super().__init__(*arguments, cwd=cwd, **options)

    def wait(self, timeout: float | None = None) -> int:
        while not self.over and self.poll() is None:
            self.over = self.ready.exists()
            if self.over:
                raise subprocess.TimeoutExpired(self.args, 0)
            time.sleep(0.01)
        return super().wait()


def test_a_piece_over_its_budget_is_ended_with_its_children(
    site: Site, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is interrupted first, so that it can keep what it has, and its log is kept."""
    monkeypatch.setattr(gpu.subprocess, "Popen", OverBudget)
    assert not Runner(site).run(install(python("slow", CHILD)))
    monkeypatch.undo()
    assert State(site.root / site.results).pieces["slow"]["outcome"] == OVER_BUDGET
    assert (site.root / "kept").exists()
    assert "began" in (site.root / site.results / "logs" / "slow.log").read_text()
    with (site.root / "held").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # waits for the grandchild to end


def test_the_pieces_after_one_over_its_budget_run(site: Site, install: Install) -> None:
    wanted = install(python("slow", "import time; time.sleep(3600)", budget=1), python("next", mark("next")))
    assert not Runner(site).run(wanted)
    assert State(site.root / site.results).pieces["slow"]["outcome"] == OVER_BUDGET
    assert count(site, "next") == 1


def test_no_piece_is_begun_that_may_not_fit(
    site: Site, install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = install(python("long", mark("long"), budget=500), python("short", mark("short"), budget=5))
    assert not Runner(site, within=100).run(wanted)
    assert (count(site, "long"), count(site, "short")) == (0, 1)
    assert "long: not run: its 500 s do not fit in the time left" in capsys.readouterr().out


def test_what_cannot_run_here_is_left_out_and_does_not_count(site: Site, install: Install) -> None:
    wanted = install(python("golden", mark("golden"), left_out=lambda _: "nothing to compare with"))
    assert Runner(site).run(wanted)
    assert count(site, "golden") == 0
    missing = python("packages", "", left_out=lambda _: "no wheels", ready=lambda _: False)
    wanted = install(missing, python("top", mark("top"), needs=("packages",)))
    assert not Runner(site).run(wanted)
    assert State(site.root / site.results).pieces["packages"]["outcome"] == LEFT_OUT
    assert count(site, "top") == 0


def test_a_check_is_done_at_its_commit_only(
    site: Site, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A measurement stays; whether the code is right is asked again of other code."""
    wanted = install(python("suite", mark("suite"), checks=True), python("bench", mark("bench")))
    for at in ("0123", "0123-dirty", "4567"):
        monkeypatch.setattr(gpu, "commit", lambda at=at: at)
        assert Runner(site).run(wanted)
    assert (count(site, "suite"), count(site, "bench")) == (2, 1)
    listed = {line.split()[0]: line for line in gpu.outcomes(State(site.root / site.results)).splitlines()}
    assert "4567" in listed["suite"]
    assert "0123" in listed["bench"]


def test_what_says_whether_the_code_is_right_is_a_check() -> None:
    checks = {piece.name for piece in PIECES if piece.checks}
    golden = {"validate-golden-t2i", "validate-golden-edit"}
    suites = {"suite", "suite-without-gpu"}
    assert checks == {*suites, "memcheck", "racecheck", "validate-shapes", "validate-published", *golden}


def test_the_fast_tier_is_measured_with_the_switches_of_its_target(site: Site) -> None:
    piece = pieces.named("bench-fast")
    words = piece.command(site)
    given = {word for word, before in zip(words[1:], words, strict=False) if before == "--switch"}
    (target,) = (found for found in targets() if found.tier == "fast" and found.device == "cuda")
    assert given == {f"{name}={setting}" for name, setting in target.switches.items()}
    assert piece.left_out(site) is None
    older = dataclasses.replace(site, gpu=Gpu("A GPU", "80-real"))
    assert piece.left_out(older) == "a GPU of architecture 80 has no products of 8-bit floats"


def test_the_checkpoint_is_where_bench_leaves_it(site: Site) -> None:
    assert site.checkpoint == converted_folder("published", "bf16", site.work)


def test_results_come_back_in_one_archive_after_every_piece(
    site: Site, install: Install, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    monkeypatch.setenv("OUT", str(tmp_path / "not-asked-for"))
    wanted = install(python("one", "print('hello')"), python("two", "raise SystemExit(1)"))
    Runner(site, archive=out).run(wanted)
    assert not (tmp_path / "not-asked-for").exists()
    assert [path.name for path in out.iterdir()] == ["a-gpu.tar.gz"]
    folder = gpu.take(out / "a-gpu.tar.gz", tmp_path / "taken")
    assert folder == tmp_path / "taken" / "a-gpu"
    assert (folder / "logs" / "one.log").read_text() == "hello\n"
    assert json.loads((folder / "state.json").read_text())["two"]["outcome"] == FAILED


def test_an_archive_leaves_out_what_is_too_large(tmp_path: Path) -> None:
    folder = tmp_path / "a-gpu"
    folder.mkdir()
    (folder / "bench.json").write_text("{}")
    (folder / "trace.json.gz").write_bytes(bytes(range(256)) * 400)
    assert gpu.pack(folder, tmp_path / "a.tar.gz", limit=50_000) == ["trace.json.gz"]
    with tarfile.open(tmp_path / "a.tar.gz") as archive:
        assert archive.getnames() == ["a-gpu/bench.json"]


def test_the_dry_run_finds_nothing_wrong(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Every piece of the run: its options are those of the command line, its files are in the checkout."""
    reference = tmp_path / "reference"
    for name in ("t2i", "edit"):
        (reference / name / "checkpoint").mkdir(parents=True)
        (reference / name / "golden.safetensors").touch()
    there = tmp_path / "there.txt"
    there.write_text(", ".join(pieces.PACKAGES.values()))
    assert gpu.main(["--dry-run", "--reference", str(reference), "--there", str(there)]) == 0
    output = capsys.readouterr().out
    assert re.search(r"a picture, H200 +at most 1\.30 s +not measured", output)
    assert "0 problems" in output
    for piece in PIECES:
        assert f"{piece.name} (at most {piece.budget} s)" in output


def test_every_piece_is_below_ten_minutes_and_needs_what_there_is() -> None:
    names = [piece.name for piece in PIECES]
    assert len(set(names)) == len(names)
    for place, piece in enumerate(PIECES):
        assert 0 < piece.budget < LONGEST
        assert all(names.index(needed) < place for needed in piece.needs)


def test_the_dry_run_finds_an_unknown_option_a_missing_file_and_a_long_budget(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = [
        Piece("a", "", 60, lambda site: [site.python, "-m", "blip3o_rt", "doctor", "--everything"]),
        Piece("b", "", 60, lambda site: ["sanitizer", site.python, "-m", "pytest", "tests/nowhere.py"]),
        Piece("c", "", LONGEST, lambda site: [site.python, "-c", "pass"]),
        Piece("validate-golden-t2i", "", 60, lambda site: ["true"]),
    ]
    reference = dataclasses.replace(site, reference=Path("recorded"))
    monkeypatch.setattr(dry_run, "missing_packages", lambda site: [])
    assert dry_run.check(reference, wrong, None, None) == 1
    output = capsys.readouterr().out
    assert "unrecognized arguments: --everything" in output
    assert "tests/nowhere.py is not in the checkout" in output
    assert f"its budget of {LONGEST} s is not below" in output
    assert "recorded/t2i/checkpoint is missing" in output
    assert "5 problems" in output


def test_the_dry_run_knows_what_wheels_must_be_carried(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = site.root / "wheels"
    folder.mkdir()
    for version in ("1", "2"):
        with zipfile.ZipFile(folder / f"diffusers-{version}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(
                f"diffusers-{version}.dist-info/METADATA", f"Name: diffusers\nVersion: {version}\n"
            )
    there = site.root / "there.txt"
    names = set(pieces.PACKAGES.values()) - {"diffusers", "zipp"}
    there.write_text("\n".join(f"{name.replace('_', '-').upper()}==1.0" for name in names))
    carrying = dataclasses.replace(site, wheels=Path("wheels"))
    found = dry_run.packages_problems(carrying, there)
    assert [problem.rpartition("/")[2] for problem in found] == [
        "wheels has 2 wheels of diffusers: keep one",
        "package zipp is neither there nor carried",
    ]
    assert "package diffusers is neither there nor carried" in dry_run.packages_problems(site, there)
    assert "carried: diffusers" in capsys.readouterr().out


def test_carried_wheels_are_installed_apart_and_found(site: Site) -> None:
    """By pip itself, without a network, into a folder that every command of the run looks in."""
    folder = site.root / "wheels"
    folder.mkdir()
    with zipfile.ZipFile(folder / "carried_thing-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried_thing.py", "answer = 42\n")
        info = "carried_thing-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: carried-thing\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    carrying = dataclasses.replace(site, wheels=Path("wheels"))
    environment = carrying.environment()
    subprocess.run(pieces.install_wheels(carrying), cwd=site.root, env=environment, check=True, timeout=120)
    question = [sys.executable, "-c", "import carried_thing; print(carried_thing.answer)"]
    answer = subprocess.run(question, cwd="/", env=environment, check=True, capture_output=True, text=True)
    assert answer.stdout == "42\n"


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "find_gpu", lambda: None)
    assert gpu.main([]) == 2
    assert "no GPU that PyTorch can use" in capsys.readouterr().err
    assert gpu.main(["--list"]) == 0
    assert "bench-ar" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"--only is nothing: accepted are packages, build"):
        gpu.main(["--only", "nothing"])


def test_a_gpu_gives_a_folder_its_name() -> None:
    assert Gpu("NVIDIA H100 80GB HBM3", "90a-real").folder == "nvidia-h100-80gb-hbm3"
    assert EXPECTED.architecture == "90a-real"
