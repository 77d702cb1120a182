"""Jobs: accepted at once, kept on disk, finished by whatever server comes next, cancelled, expired."""

from __future__ import annotations

import base64
import errno
import io
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from blip3o_rt.errors import ParameterError
from blip3o_rt.serve import store as store_module
from blip3o_rt.serve.client import Limits
from blip3o_rt.serve.store import Store
from tests.serve.conftest import RunningServer
from tests.serve.fakes import fake_image
from tests.serve.test_http import body, error, opened, png, samples

Start = Callable[..., RunningServer]
ENDS = ("completed", "failed", "cancelled", "expired")


def job(server: RunningServer, **fields: Any) -> dict[str, Any]:
    response = server.http.post("/v1/jobs", json=body(**fields))
    assert response.status_code == 202, response.text
    return response.json()


def shown(server: RunningServer, id: str) -> dict[str, Any]:
    return server.http.get(f"/v1/jobs/{id}").json()


def ended(server: RunningServer, id: str) -> dict[str, Any]:
    server.wait_until(lambda: shown(server, id)["status"] in ENDS)
    return shown(server, id)


def assert_images(server: RunningServer, found: dict[str, Any], reference: int = 0) -> None:
    assert [image["index"] for image in found["data"]] == list(range(found["n"]))
    for image in found["data"]:
        drawn = opened(server.http.get(image["url"]).content)
        assert samples(drawn) == fake_image(found["prompt"], found["seed"] + image["index"], 4, reference)
        assert set(image["seconds"]) == {"reference", "tokens", "denoise", "decode"}
        assert image["tokens_per_pass"] == 1.0


def test_a_job_is_accepted_drawn_and_kept(server: RunningServer) -> None:
    accepted = job(server, n=2)
    assert (accepted["object"], accepted["status"], accepted["seed"]) == ("image.job", "queued", 5)
    found = ended(server, accepted["id"])
    assert (found["status"], found["size"], found["error"]) == ("completed", "8x8", None)
    assert abs(found["finished_at"] - time.time()) < 60
    assert_images(server, found)
    assert found in server.http.get("/v1/jobs?limit=100").json()["data"]
    assert error(server.http.get("/v1/jobs/none"), 404)["code"] == "job_not_found"
    assert error(server.http.get(f"{found['data'][0]['url'][:-1]}7"), 404)["code"] == "image_not_found"


def test_a_job_edits(server: RunningServer) -> None:
    url = "data:image/png;base64," + base64.b64encode(png(88)).decode()
    assert_images(server, ended(server, job(server, images=[url])["id"]), 88)
    assert error(server.http.post("/v1/jobs", json=body(images=["%"])), 400)["code"] == "invalid_image"
    assert error(server.http.post("/v1/jobs", json=body(stream=True)), 400)["code"] == "unknown_parameter"


def test_a_job_that_fails_or_is_cancelled_says_so_once(server: RunningServer) -> None:
    failed = ended(server, job(server, prompt="nan")["id"])
    assert failed["status"] == "failed"
    assert failed["error"]["message"] == "the decoder's logits are not finite"
    slow = job(server, prompt="slow", steps=100, n=3)
    behind = job(server, prompt="slow", n=2)
    assert behind["queue_position"] in (None, 1, 2, 3)
    for _ in range(2):
        assert server.http.post(f"/v1/jobs/{slow['id']}/cancel").json()["status"] == "cancelled"
    server.wait_until(lambda: server.health()["running"] <= 2)
    assert ended(server, behind["id"])["status"] == "completed"
    assert shown(server, slow["id"])["status"] == "cancelled"
    done = server.http.post(f"/v1/jobs/{behind['id']}/cancel").json()
    assert done["status"] == "completed"


def test_jobs_outlive_the_server_and_only_what_is_missing_is_drawn(start: Start, tmp_path: Path) -> None:
    server = start({"max_batch": 1}, data=tmp_path).wait_ready()
    accepted = job(server, prompt="slow", n=4)
    waiting = job(server, images=[base64.b64encode(png(44)).decode()])
    server.wait_until(lambda: len(shown(server, accepted["id"])["data"]) >= 1)
    server.stop()
    begun = {path: path.stat().st_mtime_ns for path in (tmp_path / "jobs" / accepted["id"]).glob("?.png")}
    assert 1 <= len(begun) < 4
    server = start(data=tmp_path)
    assert_images(server, ended(server, accepted["id"]))
    assert_images(server, ended(server, waiting["id"]), 44)
    assert all(path.stat().st_mtime_ns == when for path, when in begun.items())


def test_a_job_is_accepted_while_the_model_loads(start: Start) -> None:
    server = start({"load_seconds": 2.0})
    assert error(server.http.post("/v1/images/generations", json=body()), 503)["code"] == "engine_unavailable"
    assert_images(server, ended(server, job(server)["id"]))


def test_a_job_s_own_deadline(start: Start) -> None:
    server = start().wait_ready()
    assert ended(server, job(server, prompt="slow", steps=100, timeout=1)["id"])["status"] == "expired"


def test_jobs_past_the_queue_are_refused(start: Start) -> None:
    server = start(limits=Limits(queue=2)).wait_ready()
    job(server, prompt="slow", n=2, steps=100)
    assert error(server.http.post("/v1/jobs", json=body()), 429)["code"] == "queue_full"


def test_a_full_disk_is_said_and_fails_no_other(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start(data=tmp_path).wait_ready()
    write = store_module._write

    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    running = job(server, prompt="slow", n=2)
    monkeypatch.setattr(store_module, "_write", full)
    found = ended(server, running["id"])
    assert (found["status"], found["error"]["code"]) == ("failed", "storage_full")
    assert "No space left" in found["error"]["message"]
    encoded = base64.b64encode(png()).decode()
    refused = server.http.post("/v1/jobs", json=body(images=[encoded]))
    assert error(refused, 503)["code"] == "storage_full"
    assert server.http.post("/v1/images/generations", json=body()).status_code == 200
    monkeypatch.setattr(store_module, "_write", write)
    assert ended(server, job(server)["id"])["status"] == "completed"


def test_old_and_too_many_are_deleted(tmp_path: Path) -> None:
    import asyncio

    from blip3o_rt.serve.store import StoredImage, StoredJob

    async def keep(seconds: float, size: int) -> set[str]:
        store = Store(tmp_path, seconds, size)
        try:
            await store.expire()
            return {found.id for found in await store.newest(None, 100)}
        finally:
            store.close()

    async def main() -> None:
        store = Store(tmp_path, 1e9, 10**9)
        file = io.BytesIO()
        Image.new("RGB", (9, 9)).save(file, "PNG")
        for id, status in (("old", "completed"), ("new", "completed"), ("waits", None)):
            await store.add(StoredJob(id, "", time.time(), {"prompt": id}, 0, 1), [b"reference"])
            await store.add_image(id, StoredImage(0, 0, "0.png", 1000, {}, 1.0), bytes(1000))
            if status:
                await store.end(id, status)
        with pytest.raises(ParameterError, match="in use"):
            Store(tmp_path, 1, 1)
        store.close()
        assert await keep(1e9, 2500) == {"old", "new", "waits"}
        assert await keep(1e9, 1500) == {"new", "waits"}
        assert not (tmp_path / "jobs" / "old").exists()
        assert await keep(-1.0, 10**9) == {"waits"}

    asyncio.run(main())
