"""Batches: every row once, with the bits of a single call, whatever ends the run between; failures apart."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from blip3o_rt.cli import main
from blip3o_rt.files import replacing
from blip3o_rt.metadata import read_metadata
from blip3o_rt.pipeline import ImageRequest, Pipeline
from blip3o_rt.rl.update import WeightStore
from blip3o_rt.scale.shards import Batch, BatchFolder

STEPS = ["--steps", "1", "--dtype", "fp32", "--device", "cpu", "--quiet"]
COLORS = ("red", "green", "blue", "yellow")


def prompts(count: int) -> list[str]:
    return [f"a {COLORS[i % 4]} circle on a {COLORS[(i + 1) % 4]} background" for i in range(count)]


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline.load(device="cpu", dtype="fp32")


@pytest.fixture
def edits(tmp_path: Path, pipeline: Pipeline) -> Path:
    """Ten rows: prompts, an edit, and of each kind of failure one."""
    reference = pipeline.generate("a red circle", steps=1)[0]
    reference.save(tmp_path / "reference.png")
    (tmp_path / "damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    rows: list[str] = [json.dumps({"prompt": text, "id": i}) for i, text in enumerate(prompts(5))]
    rows.insert(1, json.dumps({"prompt": "make it green", "image": "reference.png"}))
    rows.insert(2, json.dumps({"prompt": "make it green", "image": "damaged.png"}))
    rows.insert(3, '{"prompt": "cut')
    rows.insert(4, json.dumps({"prompt": " "}))
    rows.insert(5, json.dumps({"prompt": "make it green", "image": "nowhere.png"}))
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(rows) + "\n")
    return path


FAILED = [2, 3, 4, 5]


def images_of(folder: Path) -> dict[int, bytes]:
    """Row -> PNG, of finished shards of any format."""
    found: dict[int, bytes] = {}

    def add(row: int, data: bytes) -> None:
        assert row not in found
        found[row] = data

    for path in folder.glob("[0-9]*/*.png"):
        add(int(path.stem), path.read_bytes())
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as archive:
            for member in archive.getmembers():
                if member.name.endswith(".png"):
                    add(int(member.name[:-4]), archive.extractfile(member).read())
    for path in folder.glob("*.parquet"):
        import pyarrow.parquet

        for row in pyarrow.parquet.read_table(path).to_pylist():
            add(row["row"], row["image"])
    return found


def failures_of(folder: Path) -> list[dict[str, Any]]:
    lines = [line for path in sorted((folder / "failures").glob("*")) for line in path.open()]
    return [json.loads(line) for line in lines]


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


@pytest.mark.parametrize("format", ["folder", "tar", "parquet"])
def test_every_row_once_as_a_single_call_draws_it(
    format: str, edits: Path, tmp_path: Path, pipeline: Pipeline
) -> None:
    """Row i has seed + i; what cannot be drawn is in a table of its own, with why."""
    if format == "parquet":
        pytest.importorskip("pyarrow")
    out = tmp_path / "out"
    arguments = ["batch", str(edits), "--out", str(out), "--seed", "40", "--format", format]
    assert main([*arguments, "--shard-rows", "4", *STEPS]) == 1
    found = images_of(out)
    assert sorted(found) == [row for row in range(10) if row not in FAILED]
    expected = pipeline.generate(prompts(5)[4], seed=49, steps=1)[0]
    assert np.array_equal(pixels(found[9]), np.asarray(expected))
    edited = pipeline.edit("make it green", edits.parent / "reference.png", seed=41, steps=1)[0]
    assert np.array_equal(pixels(found[1]), np.asarray(edited))
    failures = failures_of(out)
    assert [failure["row"] for failure in failures] == FAILED
    assert [failure["error"] for failure in failures] == [
        *("ImageError", "ParameterError", "PromptError", "ImageError")
    ]
    assert "nowhere.png" in failures[3]["message"]
    assert not list((out / ".work" / "rows").iterdir())
    assert main([*arguments, "--shard-rows", "4", *STEPS]) == 1  # there is nothing left to do
    assert images_of(out) == found


def test_files_say_what_they_hold(edits: Path, tmp_path: Path) -> None:
    for format in ("folder", "tar"):
        main(["batch", str(edits), "--out", str(tmp_path / format), "--format", format, *STEPS])
    lines = [json.loads(line) for line in (tmp_path / "folder" / "00000" / "metadata.jsonl").open()]
    assert [line["row"] for line in lines] == [0, 1, 6, 7, 8, 9]
    assert lines[2]["file_name"] == "000000006.png"
    assert (lines[2]["prompt"], lines[2]["seed"], lines[2]["id"]) == (prompts(5)[1], 6, 1)
    assert read_metadata(tmp_path / "folder" / "00000" / "000000006.png")["seed"] == 6
    with tarfile.open(tmp_path / "tar" / "00000.tar") as archive:
        names = archive.getnames()
        assert names[:3] == ["000000000.png", "000000000.txt", "000000000.json"]
        assert json.load(archive.extractfile("000000006.json")) == lines[2]
        assert archive.extractfile("000000006.txt").read().decode() == prompts(5)[1]


def test_what_is_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends at the 6th of 10 rows; the next one draws four."""
    path, out = tmp_path / "a.txt", tmp_path / "out"
    path.write_text("\n".join(prompts(10)))
    drawn: list[int] = []
    real = BatchFolder.done

    def done(self: BatchFolder, row: Any, found: Any) -> None:
        if len(drawn) == 6:
            raise KeyboardInterrupt
        real(self, row, found)
        drawn.append(row.index)

    arguments = ["batch", str(path), "--out", str(out), "--shard-rows", "4", *STEPS]
    monkeypatch.setattr(BatchFolder, "done", done)
    assert main(arguments) == 130
    assert len(drawn) == 6
    again: list[int] = []
    monkeypatch.setattr(
        BatchFolder, "done", lambda s, row, found: (real(s, row, found), again.append(row.index))
    )
    assert main(arguments) == 0
    assert sorted(drawn + again) == list(range(10))
    assert sorted(images_of(out)) == list(range(10))


@pytest.mark.parametrize("format", ["folder", "tar"])
def test_what_killed_writers_left_is_removed(
    format: str, edits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    arguments = ["batch", str(edits), "--out", str(out), "--format", format, *STEPS]
    with monkeypatch.context() as patch:
        patch.setattr(BatchFolder, "finish", _interrupt)
        assert main(arguments) == 130
    (out / "failures").mkdir()
    for name in ("batch.json", f"00000.{format}", "failures/00000.jsonl"):
        _leave(out / name)
    for name in ("00000/000000001.png", "00000/metadata.jsonl", "00000.failed/000000002.json"):
        _leave(out / ".work" / name)
    assert main(arguments) == 1
    assert [path.name for path in out.rglob(".*")] == [".work"]
    assert sorted(images_of(out)) == [row for row in range(10) if row not in FAILED]
    assert [failure["row"] for failure in failures_of(out)] == FAILED


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _leave(target: Path) -> None:
    """What a writer leaves of a file when it is killed."""
    with suppress(KeyboardInterrupt), replacing(target) as temporary:
        raise KeyboardInterrupt
    temporary.write_bytes(b"half")


@pytest.mark.parametrize("step", ["metadata", "rename", "unlink"])
def test_a_shard_that_is_interrupted_while_it_is_finished(
    step: str, edits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    arguments = ["batch", str(edits), "--out", str(out), "--shard-rows", "5", *STEPS]
    with monkeypatch.context() as patch:

        def interrupt(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        if step == "metadata":
            patch.setattr(BatchFolder, "_write_metadata", interrupt)
        else:
            real = getattr(Path, "replace" if step == "rename" else "unlink")

            def interrupted(self: Path, *rest: Any, **options: Any) -> Any:
                if self.name == "00000" or (self.name == "00000.jsonl" and self.parent.name == "rows"):
                    raise KeyboardInterrupt
                return real(self, *rest, **options)

            patch.setattr(Path, real.__name__, interrupted)
        assert main(arguments) == 130
    done: list[int] = []
    monkeypatch.setattr(BatchFolder, "done", _counting(BatchFolder.done, lambda row: done.append(row.index)))
    assert main(arguments) == 1
    assert not set(done) & set(range(5))
    assert sorted(images_of(out)) == [row for row in range(10) if row not in FAILED]
    assert [failure["row"] for failure in failures_of(out)] == FAILED


def _counting(real: Callable[..., None], told: Callable[[Any], None]) -> Callable[..., None]:
    def done(self: BatchFolder, row: Any, found: Any) -> None:
        told(row)
        real(self, row, found)

    return done


def test_another_batch_in_the_folder_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = tmp_path / "a.txt", tmp_path / "out"
    path.write_text("a red circle")
    arguments = ["batch", str(path), "--out", str(out), *STEPS]
    assert main(arguments) == 0
    for change in (["--seed", "1"], ["--steps", "2"], ["--format", "tar"], ["--dtype", "bf16"]):
        assert main([*arguments, *change]) == 2
    path.write_text("a blue circle")
    assert main(arguments) == 2
    assert "sha256" in capsys.readouterr().err
    path.write_text("a red circle\na blue circle")
    assert main(["batch", str(path), "--out", str(tmp_path), *STEPS]) == 2
    assert "not empty" in capsys.readouterr().err
    folder = BatchFolder(tmp_path / "locked", Batch(str(path)))
    with folder.in_use():
        assert main(["batch", str(path), "--out", str(tmp_path / "locked"), *STEPS]) == 2
    assert "in use" in capsys.readouterr().err


def test_other_weights_do_not_go_on_with_a_batch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = tmp_path / "a.txt", tmp_path / "out"
    path.write_text("\n".join(prompts(2)))
    arguments = ["batch", str(path), "--out", str(out), "--shard-rows", "1", *STEPS]
    with monkeypatch.context() as patch:
        patch.setattr(BatchFolder, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(arguments) == 130
    with monkeypatch.context() as patch:
        patch.setattr(WeightStore, "checksum", lambda self: "another")
        assert main(arguments) == 2
    assert "other weights" in capsys.readouterr().err
    assert main(arguments) == 0


def test_requests_of_all_kinds_share_a_call(pipeline: Pipeline, tmp_path: Path) -> None:
    """Each is as it would be alone; an error stands where its image would."""
    reference = pipeline.generate("a red circle", steps=1)[0]
    requests = [
        ImageRequest("a red circle", 3),
        ImageRequest("make it green", 4, reference),
        ImageRequest("", 5),
        ImageRequest("a blue square", -1),
        ImageRequest("make it green", 6, tmp_path / "nowhere.png"),
        ImageRequest("a blue square", 7),
    ]
    told: dict[int, object] = {}
    found = pipeline.generate_each(requests, steps=1, on_result=told.__setitem__)
    assert [type(one).__name__ for one in found[2:5]] == ["PromptError", "ParameterError", "ImageError"]
    assert np.array_equal(found[0], pipeline.generate("a red circle", seed=3, steps=1)[0])
    assert np.array_equal(found[1], pipeline.edit("make it green", reference, seed=4, steps=1)[0])
    assert np.array_equal(found[5], pipeline.generate("a blue square", seed=7, steps=1)[0])
    assert [told[index] for index in range(6)] == found
    assert pipeline.generate_each([]) == []


ROWS = int(os.environ.get("BLIP3O_BATCH_ROWS", "2000"))
KILLS, SHARD_ROWS = 20, 64
CUT, EDITED = ROWS // 2, range(5, ROWS, 40)  # a row that cannot be read, and rows that are edits
MIB = 2**20


class BatchProcess:
    """`blip3o-rt batch` in a process of its own, over the rows of the file that `table` made."""

    def __init__(self, table: Path, out: Path, *options: str) -> None:
        self.out = out
        command = [sys.executable, "-m", "blip3o_rt", "batch", str(table), "--out", str(out), *STEPS]
        sizes = ["--shard-rows", str(SHARD_ROWS), "--max-batch", "16", "--format", "tar"]
        self.process = subprocess.Popen(
            [*command, *sizes, *options],
            start_new_session=True,
            # The order of sums may depend on threads.
            env={**os.environ, "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"},
        )

    def rows(self) -> int:
        """How many rows are done."""
        work = self.out / ".work"
        waiting = {path.stem for path in (work / "rows").glob("*.jsonl")}
        begun = sum(len(list((work / shard).glob("*.png"))) for shard in waiting)
        return SHARD_ROWS * len(list(self.out.glob("*.tar"))) + begun

    def kill(self) -> bool:
        """Kill it; whether it was still at work."""
        working = self.process.poll() is None
        if working:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        return working


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory, pipeline: Pipeline) -> Path:
    """Prompts, an edit now and then, and a line that is cut."""
    folder = tmp_path_factory.mktemp("table")
    pipeline.generate("a red circle", steps=1)[0].save(folder / "reference.png")
    rows: list[dict[str, str]] = [{"prompt": text} for text in prompts(ROWS)]
    for row in EDITED:
        rows[row] = {"prompt": "make it green", "image": "reference.png"}
    lines = [json.dumps(row) for row in rows]
    lines[CUT] = '{"prompt": "cut'
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return folder / "rows.jsonl"


@dataclass(frozen=True)
class Killed:
    """A run that was killed at random and resumed; `memory` is bytes by rows done of the last process."""

    out: Path
    kills: int
    memory: list[tuple[int, int]]


@pytest.fixture(scope="module")
def killed(table: Path) -> Killed:
    """Kills over the first half of the rows, also while it loads and packs; the other half is one process."""
    dice, out, kills = random.Random(0), table.parent / "killed", 0
    for _ in range(KILLS):
        run = BatchProcess(table, out)
        aim = run.rows() + dice.randrange(ROWS // KILLS)
        while run.rows() < aim and run.process.poll() is None:
            time.sleep(0.05)
        time.sleep(dice.uniform(0, 0.5))
        kills += run.kill()
    run, memory = BatchProcess(table, out), []
    process = psutil.Process(run.process.pid)
    while run.process.poll() is None:
        with suppress(psutil.NoSuchProcess):
            memory.append((run.rows(), process.memory_info().rss))
        time.sleep(0.5)
    assert run.process.wait() == 1  # for the row that failed
    return Killed(out, kills, memory)


@pytest.mark.exhaustive
def test_killed_20_times(killed: Killed, pipeline: Pipeline) -> None:
    """Each row once, with the image of a single call; a corrupt one costs only itself."""
    found = images_of(killed.out)
    assert killed.kills == KILLS
    assert sorted(found) == [row for row in range(ROWS) if row != CUT]
    assert [failure["row"] for failure in failures_of(killed.out)] == [CUT]
    for row in [CUT - 1, CUT + 1, *range(0, ROWS, max(1, ROWS // 40))]:
        if row not in EDITED and row != CUT:
            expected = pipeline.generate(prompts(ROWS)[row], seed=row, steps=1)[0]
            assert np.array_equal(pixels(found[row]), np.asarray(expected)), row


@pytest.mark.exhaustive
def test_memory_does_not_grow_with_the_rows(killed: Killed) -> None:
    """From the third shard of a process on, the last half of its rows takes no more than the first."""
    begin = killed.memory[0][0] + 2 * SHARD_ROWS
    middle = begin + (ROWS - begin) // 2
    first = [used for rows, used in killed.memory if begin <= rows < middle]
    last = [used for rows, used in killed.memory if rows >= middle]
    print(f"{max(first) / MIB:.1f} MiB, then {max(last) / MIB:.1f} MiB")
    assert max(last) < max(first) + 4 * MIB


@pytest.mark.exhaustive
def test_thousands_of_rows_on_ray(table: Path, killed: Killed, tmp_path: Path) -> None:
    """Shards and failures are those of one machine, byte for byte, whatever killed it."""
    pytest.importorskip("ray.data")
    options = ("--ray", "local", "--workers", "2", "--cpus-per-worker", "0.5")
    run = BatchProcess(table, tmp_path / "ray", *options)
    assert run.process.wait() == 1
    assert files_of(run.out) == files_of(killed.out)


def files_of(folder: Path) -> dict[str, bytes]:
    """The files of finished shards, and of failures."""
    return {path.name: path.read_bytes() for path in [*folder.glob("*.tar"), *folder.glob("failures/*")]}
