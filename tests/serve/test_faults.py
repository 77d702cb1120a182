"""`blip3o-rt serve` as a whole when it is killed, stopped, drained, starved of memory or of its model."""

from __future__ import annotations

import io
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from PIL import Image

from tests.serve.conftest import ServerProcess

pytestmark = pytest.mark.exhaustive

GENERATIONS, JOBS = "/v1/images/generations", "/v1/jobs"
BODY = {"prompt": "a red circle on a blue background", "seed": 7, "steps": 20}


@pytest.fixture
def serve() -> Iterator[Callable[..., ServerProcess]]:
    servers: list[ServerProcess] = []

    def begin(*arguments: str) -> ServerProcess:
        servers.append(ServerProcess(*arguments))
        return servers[-1]

    yield begin
    for server in servers:
        if server.process.poll() is None:
            server.stop()


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def wait_gone(pid: int) -> None:
    end = time.monotonic() + 20
    while not gone(pid):
        assert time.monotonic() < end
        time.sleep(0.02)


def ended(server: ServerProcess, id: str) -> dict[str, Any]:
    """A job that has ended."""
    server.wait_until(lambda: server.http.get(f"{JOBS}/{id}").json()["finished_at"] is not None, 180)
    found: dict[str, Any] = server.http.get(f"{JOBS}/{id}").json()
    return found


def in_background(server: ServerProcess, answers: list[httpx.Response], **fields: object) -> threading.Thread:
    def ask() -> None:
        answers.append(httpx.post(server.url + GENERATIONS, json={**BODY, **fields}, timeout=600))

    thread = threading.Thread(target=ask)
    thread.start()
    return thread


def status_within_2_seconds(server: ServerProcess, statuses: set[str]) -> None:
    server.wait_until(lambda: server.health()["status"] in statuses, 2)
    assert server.http.get("/health").status_code == 503
    assert server.http.get("/ready").status_code == 503


def test_engine_killed_mid_batch_stopped_and_killed_while_loading(
    serve: Callable[..., ServerProcess],
) -> None:
    server = serve().wait_ready()
    expected = server.http.post(GENERATIONS, json={**BODY, "n": 4}).json()["data"]
    answers: list[httpx.Response] = []
    thread = in_background(server, answers, n=4)
    server.wait_until(lambda: server.health()["running"] > 0)
    pid = server.health()["engine_pid"]
    os.kill(pid, signal.SIGKILL)
    status_within_2_seconds(server, {"restarting"})
    server.wait_until(lambda: server.health()["engine_pid"] not in (None, pid))
    os.kill(server.health()["engine_pid"], signal.SIGKILL)  # while it loads
    server.wait_until(lambda: server.health()["engine_restarts"] == 2, 2)
    refused = server.http.post(GENERATIONS, json=BODY)
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) >= 1
    thread.join()
    found = answers[0].json()["data"]
    assert [image["b64_json"] for image in found] == [image["b64_json"] for image in expected]

    thread = in_background(server, answers, n=4)
    server.wait_until(lambda: server.health()["running"] > 0)
    os.kill(server.health()["engine_pid"], signal.SIGSTOP)
    status_within_2_seconds(server, {"stopped"})
    os.kill(server.health()["engine_pid"], signal.SIGCONT)
    thread.join()
    found = answers[1].json()["data"]
    assert [image["b64_json"] for image in found] == [image["b64_json"] for image in expected]
    assert server.health()["status"] == "ok"
    children = psutil.Process(server.process.pid).children(recursive=True)
    assert server.stop() == 0
    for child in children:
        wait_gone(child.pid)


def test_jobs_are_finished_after_a_kill_of_the_front(
    serve: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    server = serve("--data", str(tmp_path)).wait_ready()
    ids = [server.http.post(JOBS, json={**BODY, "seed": seed, "n": 2}).json()["id"] for seed in range(4)]
    server.wait_until(lambda: bool(server.http.get(f"{JOBS}/{ids[0]}").json()["data"]))
    engine = server.health()["engine_pid"]
    server.kill()
    wait_gone(engine)
    server = serve("--data", str(tmp_path)).wait_ready()  # whatever was done before the kill
    for seed, id in enumerate(ids):
        assert ended(server, id)["status"] == "completed"
        answer = server.http.post(
            GENERATIONS, json={**BODY, "seed": seed, "n": 2, "response_format": "url"}
        ).json()
        job = server.http.get(f"{JOBS}/{id}").json()
        for drawn, kept in zip(answer["data"], job["data"], strict=True):
            assert server.http.get(drawn["url"]).content == server.http.get(kept["url"]).content


def test_sigterm_lets_requests_end_and_refuses_new_ones(serve: Callable[..., ServerProcess]) -> None:
    server = serve().wait_ready()
    answers: list[httpx.Response] = []
    thread = in_background(server, answers, n=2)
    server.wait_until(lambda: server.health()["running"] > 0)
    engine = server.health()["engine_pid"]
    assert server.stop() == 0
    thread.join()
    assert answers[0].status_code == 200
    wait_gone(engine)


def test_a_model_that_cannot_be_loaded_and_a_restart_loop(
    serve: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    server = serve("--model", str(tmp_path))
    server.wait_until(lambda: server.health()["status"] == "failing", 60)
    health = server.health()
    assert "config.json" in health["message"] or str(tmp_path) in health["message"]
    refused = server.http.post(GENERATIONS, json=BODY)
    assert refused.status_code == 503
    assert str(tmp_path) in refused.json()["error"]["message"]
    server.wait_until(lambda: server.health()["engine_restarts"] >= 3, 90)
    first = server.health()["engine_restarts"]
    time.sleep(1.0)
    assert server.health()["engine_restarts"] <= first + 1  # it waits between them
    assert server.stop() == 0


def test_memory_that_runs_out(serve: Callable[..., ServerProcess]) -> None:
    scarce = serve("--memory-reserve", str(2**20)).wait_ready()  # a TiB must stay free
    refused = scarce.http.post(GENERATIONS, json=BODY)
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "insufficient_memory"
    assert int(refused.headers["retry-after"]) >= 1
    assert scarce.health()["status"] == "ok"


def test_memory_that_runs_out_in_the_engine(serve: Callable[..., ServerProcess]) -> None:
    server = serve().wait_ready()
    expected = server.http.post(GENERATIONS, json=BODY).json()["data"][0]["b64_json"]
    engine = psutil.Process(server.health()["engine_pid"])
    most = engine.memory_info().vms + 2**20
    engine.rlimit(psutil.RLIMIT_AS, (most, most))
    file = io.BytesIO()
    Image.new("RGB", (5000, 5000)).save(file, "PNG")
    fields = {"prompt": "make it green", "steps": 1}
    answer = server.http.post("/v1/images/edits", data=fields, files={"image": file.getvalue()})
    if answer.status_code != 200:  # drawn by the next engine, or refused
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] in ("insufficient_memory", "engine_lost")
    server.wait_ready()
    answer = server.http.post(GENERATIONS, json=BODY)
    assert answer.status_code == 200, answer.text
    assert answer.json()["data"][0]["b64_json"] == expected


def test_two_servers_do_not_share_a_folder(serve: Callable[..., ServerProcess], tmp_path: Path) -> None:
    serve("--data", str(tmp_path))
    with pytest.raises(IndexError):  # it ends before it names its address
        serve("--data", str(tmp_path))


def test_a_full_disk(serve: Callable[..., ServerProcess], tmp_path: Path) -> None:
    if os.system(f"mount -t tmpfs -o size=400k tmpfs {tmp_path} 2>/dev/null"):
        pytest.skip("needs the right to mount a small file system")
    try:
        server = serve("--data", str(tmp_path)).wait_ready()
        (tmp_path / "ballast").write_bytes(bytes(300_000 - sum(p.stat().st_size for p in tmp_path.glob("*"))))
        ends = set()
        for seed in range(12):
            answer = server.http.post(JOBS, json={**BODY, "seed": seed, "n": 10, "steps": 1})
            if answer.status_code == 503:
                ends.add(answer.json()["error"]["code"])
                break
            found = ended(server, answer.json()["id"])
            if found["status"] == "failed":
                ends.add(found["error"]["code"])
        assert ends == {"storage_full"}
        assert server.http.post(GENERATIONS, json=BODY).status_code == 200
        (tmp_path / "ballast").unlink()
        answer = server.http.post(JOBS, json={**BODY, "steps": 1})
        assert answer.status_code == 202, json.dumps(answer.json())
        assert ended(server, answer.json()["id"])["status"] == "completed"
        assert server.stop() == 0
    finally:
        os.system(f"umount {tmp_path}")
