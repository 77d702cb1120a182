"""The same batch on a local Ray cluster: the files of one machine, also where a worker is killed."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from blip3o_rt.cli import main
from tests.scale.test_batch import FAILED, STEPS, edits, failures_of, images_of, pipeline, prompts

__all__ = ["edits", "pipeline"]

pytestmark = pytest.mark.exhaustive


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, object_store_memory=100 * 2**20, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


def test_files_are_those_of_one_machine(cluster: Any, edits: Path, tmp_path: Path) -> None:
    arguments = ["batch", str(edits), "--shard-rows", "3", "--format", "tar", *STEPS]
    assert main([*arguments, "--out", str(tmp_path / "here")]) == 1
    on_ray = ["--out", str(tmp_path / "ray"), "--ray", "auto", "--workers", "2"]
    assert main([*arguments, *on_ray]) == 1
    for name in ("00000.tar", "00001.tar", "00002.tar", "00003.tar"):
        assert (tmp_path / "ray" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
    assert [failure["row"] for failure in failures_of(tmp_path / "ray")] == FAILED


def test_a_worker_that_is_killed_is_replaced(cluster: Any, tmp_path: Path) -> None:
    path, out = tmp_path / "a.txt", tmp_path / "out"
    path.write_text("\n".join(prompts(60)))
    killed: list[int] = []

    def kill() -> None:
        while len(list((out / ".work").glob("0*/*.png"))) < 5:
            time.sleep(0.05)
        for process in psutil.Process().children(recursive=True):
            if not killed and "MapWorker" in "".join(process.cmdline()) + process.name():
                process.kill()
                killed.append(process.pid)

    killer = threading.Thread(target=kill)
    killer.start()
    arguments = ["batch", str(path), "--out", str(out), "--shard-rows", "20", *STEPS]
    assert main([*arguments, "--ray", "auto"]) == 0
    killer.join()
    assert killed
    assert sorted(images_of(out)) == list(range(60))


def test_where_there_is_no_cluster(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("a red circle")
    arguments = ["batch", str(tmp_path / "a.txt"), "--out", str(tmp_path / "out"), *STEPS]
    assert main([*arguments, "--workers", "2"]) == 2
    assert "--ray" in capsys.readouterr().err
