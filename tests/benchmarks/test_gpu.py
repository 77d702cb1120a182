"""The GPU run: what fits comes first, what takes too long is ended, results come back after every piece."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import gpu, pieces
from benchmarks.gpu import CUT, DONE, FAILED, LEFT_OUT, Run
from benchmarks.pieces import PIECES, Piece, Site
from benchmarks.targets import targets

ESSENTIAL = {piece.name for piece in PIECES if piece.essential}


@pytest.fixture
def site(tmp_path: Path) -> Site:
    found = Site(tmp_path / "work" / "a-gpu", tmp_path / "work")
    found.results.mkdir(parents=True)
    return found


def python(name: str, code: str, seconds: int = 60) -> Piece:
    return Piece(name, f"what {name} does", seconds, lambda site: [site.python, "-c", code])


class Machine:
    """A machine whose clock only its pieces move."""

    def __init__(self, **taken: float) -> None:
        self.now, self.taken, self.order = 0.0, taken, list[str]()

    def clock(self) -> float:
        return self.now

    def execute(self, piece: Piece, seconds: float) -> str:
        self.order.append(piece.name)
        self.now += min(seconds, self.taken.get(piece.name, seconds))
        return DONE

    def run(self, site: Site, seconds: float) -> list[str]:
        Run(site, seconds, self.execute, self.clock).all([p for p in PIECES if p.call == 1])
        return self.order


def test_the_first_call_fits_in_eight_minutes(site: Site) -> None:
    """Every piece takes all of its seconds; what matters most is among them."""
    machine = Machine()
    assert machine.run(site, 480.0) == [piece.name for piece in PIECES if piece.call == 1]
    assert machine.now + gpu.PACKING <= 480.0
    assert {"build", "headline", "eager"} <= ESSENTIAL


@pytest.mark.parametrize("seconds", [180, 240, 300, 400])
def test_time_is_kept_for_what_matters(site: Site, seconds: float) -> None:
    machine = Machine()
    assert set(machine.run(site, seconds)) >= ESSENTIAL
    assert machine.now + gpu.PACKING <= seconds


def test_time_that_a_piece_leaves_over_is_used(site: Site) -> None:
    quick = dict.fromkeys(ESSENTIAL, 1.0)
    assert set(Machine(**quick).run(site, 240.0)) > set(Machine().run(site, 240.0))


def test_the_dry_run_fails_where_what_matters_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--dry-run", "--seconds", "480"]) == 0
    assert "PROBLEM" not in capsys.readouterr().out
    assert gpu.main(["--dry-run", "--seconds", "150"]) == 1
    assert "PROBLEM: eager does not fit in 150 s" in capsys.readouterr().out
    assert gpu.main(["--dry-run", "--second", "--seconds", "200"]) == 0
    assert "compiled-vae.decode: done" in capsys.readouterr().out


def test_the_dry_run_finds_an_unknown_option_and_a_missing_file() -> None:
    unknown = [sys.executable, "-m", "blip3o_rt", "bench", "--everything"]
    assert "does not take bench --everything" in gpu.command_problems(unknown)[0]
    absent = [sys.executable, "-m", "pytest", "tests/nowhere.py"]
    assert gpu.command_problems(absent) == ["tests/nowhere.py is not in the checkout"]


def test_results_come_back_after_every_piece(site: Site, tmp_path: Path) -> None:
    run = Run(site, 100.0, gpu.execute(site, tmp_path / "out"))
    run.all([python("one", "print('hello')", 30), python("two", "raise SystemExit(3)", 30)])
    assert [path.name for path in (tmp_path / "out").iterdir() if path.suffix == ".gz"] == ["results.tar.gz"]
    folder = gpu.take(tmp_path / "out" / "results.tar.gz", tmp_path / "taken")
    assert folder == tmp_path / "taken" / "a-gpu"
    assert (folder / "one.log").read_text() == "hello\n"
    assert json.loads((folder / "state.json").read_text())["one"]["outcome"] == DONE
    assert run.state["two"]["outcome"] == FAILED


@pytest.fixture
def ignored_interrupts() -> Iterator[None]:
    """As in a process that a shell has started with `&`."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ignored_interrupts")
def test_a_piece_over_its_seconds_is_interrupted_and_keeps_what_it_has(tmp_path: Path) -> None:
    assert gpu.main(["--dry-run"]) == 0  # what the command begins with
    code = "import time\ntry:\n print('began', flush=True)\n time.sleep(600)\n"
    code += f"except KeyboardInterrupt:\n open({str(tmp_path / 'kept')!r}, 'w')"
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"began\n"  # however long the machine took to start it
    assert gpu.wait(process, 0.0) == CUT
    assert process.poll() is not None
    assert (tmp_path / "kept").exists()


def test_a_second_call_ends_with_what_the_first_left_undone(site: Site) -> None:
    first = Run(site, 300.0, lambda piece, seconds: FAILED if piece.name == "ops" else DONE, lambda: 0.0)
    first.all([p for p in PIECES if p.call == 1 and p.name != "fast"])
    second = Run(site, 300.0, lambda *_: DONE, lambda: 0.0)
    found = gpu.chosen(gpu.build_parser().parse_args(["--second"]), second)
    assert [piece.name for piece in found] == [
        "build",
        "compiled-ar.token",
        "compiled-dit.step",
        "compiled-vae.decode",
        "ops",
        "fast",
    ]
    assert first.state["headline"]["outcome"] == DONE
    assert LEFT_OUT not in {entry["outcome"] for entry in first.state.values()}


def test_carried_wheels_are_found_without_pip(site: Site, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "carried-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried_thing.py", "answer = 42\n")
    gpu.unpack_wheels(tmp_path, site.work / "packages")
    question = [sys.executable, "-c", "import carried_thing; print(carried_thing.answer)"]
    answer = subprocess.run(
        question, cwd="/", env=site.environment(), check=True, capture_output=True, text=True
    )
    assert answer.stdout == "42\n"


def test_the_fast_tier_is_measured_with_the_switches_of_its_target(site: Site) -> None:
    (piece,) = (piece for piece in PIECES if piece.name == "fast")
    words = piece.command(site)
    given = {word for word, before in zip(words[1:], words, strict=False) if before == "--switch"}
    fast = [target for target in targets() if target.tier == "fast" and target.device == "cuda"]
    assert {target.batch for target in fast} == {1, 32}
    for target in fast:
        assert given == {f"{name}={setting}" for name, setting in target.switches.items()}


def test_without_a_gpu_or_a_package_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "missing", lambda names: [])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "no GPU that PyTorch can use" in capsys.readouterr().err
    assert gpu.main(["--ready"]) == 0
    monkeypatch.setattr(gpu, "missing", lambda names: ["triton"])
    assert gpu.main(["--ready"]) == 2
    assert "missing packages: triton" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"--only is nothing: accepted are build, ops"):
        gpu.main(["--only", "nothing", "--dry-run"])


def test_results_of_several_gpus_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    with tarfile.open(tmp_path / "r.tar.gz", mode="w:gz") as archive:
        for name in ("a", "b"):
            archive.add(tmp_path / name, name)
    with pytest.raises(SystemExit, match="holds 2 folders"):
        gpu.take(tmp_path / "r.tar.gz", tmp_path)


def test_missing_packages_are_named() -> None:
    assert pieces.missing(("json", "no_such_package")) == ["no_such_package"]
