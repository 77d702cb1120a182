"""Pausing the engine, replacing its weights and putting it to sleep over HTTP."""

from __future__ import annotations

import base64
import io
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from blip3o_rt.embedded import embedded_checkpoint
from blip3o_rt.pipeline import Pipeline
from blip3o_rt.serve.client import Limits
from blip3o_rt.serve.messages import Control, Controlled, EngineOptions, Failed, Finished, Started, Submit
from blip3o_rt.serve.scheduler import Scheduler
from blip3o_rt.serve.server import ServerOptions
from tests.serve.conftest import FAKES, RunningServer
from tests.serve.fakes import FakeStages

KEY = "an-admin-key-of-length"
ADMIN = {"Authorization": f"Bearer {KEY}"}
PROMPT, STEPS = "a red circle", 2


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of other weights."""
    folder = tmp_path_factory.mktemp("admin") / "new"
    shutil.copytree(embedded_checkpoint(), folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor * 1.03 for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture(params=["real"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RunningServer]:
    """One with the model, or with fakes in its place."""
    (tmp_path / "admin").write_text(KEY)
    (tmp_path / "users").write_text("a-key-of-one-of-the-users")
    engine = EngineOptions({"device": "cpu", "dtype": "fp32"})
    if request.param == "fakes":
        engine = EngineOptions({}, loader=FAKES)
    options = ServerOptions(
        engine, port=0, admin_keys=tmp_path / "admin", keys=tmp_path / "users", limits=Limits(queue=50)
    )
    running = RunningServer(options).wait_ready()
    running.http.headers["Authorization"] = "Bearer a-key-of-one-of-the-users"
    yield running
    running.stop()


def drawn(server: RunningServer, seed: int = 3) -> np.ndarray:
    body = {"prompt": PROMPT, "seed": seed, "steps": STEPS}
    response = server.http.post("/v1/images/generations", json=body)
    assert response.status_code == 200, response.text
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(response.json()["data"][0]["b64_json"]))))


def admin(server: RunningServer, path: str, body: Any = None, status: int = 200) -> dict[str, Any]:
    response = server.http.post(f"/admin/{path}", json=body, headers=ADMIN)
    assert response.status_code == status, response.text
    return response.json()


def test_weights_are_replaced_between_requests(server: RunningServer, new: Path) -> None:
    """Requests that wait during the pause, and those after an engine that was killed, have the new ones."""
    fresh, old = (Pipeline.load(path, device="cpu", dtype="fp32") for path in (new, None))
    before, after = (np.asarray(p.generate(PROMPT, seed=3, steps=STEPS)[0]) for p in (old, fresh))
    assert np.array_equal(drawn(server), before)
    assert admin(server, "weights", {"path": str(new)}, 400)["error"]["message"].startswith(
        "requests may run"
    )
    admin(server, "pause", {"mode": "keep"})
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(drawn, server)
        server.wait_until(lambda: server.client.waiting == 1)
        assert admin(server, "weights", {"path": "/nowhere"}, 400)["error"]["code"] == "invalid_weights"
        found = admin(server, "weights", {"path": str(new)})
        assert found == {"version": 1, "checksum": fresh.weights_checksum()}
        admin(server, "sleep")
        assert admin(server, "resume", status=400)["error"]["message"].startswith("the engine sleeps")
        admin(server, "wake")
        admin(server, "resume")
        assert np.array_equal(waiting.result(), after)
    server.client.process.kill()
    server.wait_until(lambda: server.client.restarts == 1)
    server.wait_ready()
    assert np.array_equal(drawn(server), after)


@pytest.mark.parametrize("server", ["fakes"], indirect=True)
def test_it_is_behind_a_key_of_its_own(server: RunningServer, tmp_path: Path) -> None:
    for headers in ({}, {"Authorization": "Bearer a-key-of-one-of-the-users"}):
        response = server.http.request("POST", "/admin/pause", json={}, headers=headers)
        assert response.status_code == 401
    admin(server, "pause", {"mode": "never"}, 400)
    assert server.http.get("/admin/weights", headers=ADMIN).json() == {"version": 1, "checksum": "fake"}
    assert server.http.post("/v1/images/generations", json={}, headers=ADMIN).status_code == 401


def test_without_admin_keys_there_are_no_routes(start: Any) -> None:
    assert start().wait_ready().http.post("/admin/pause", json={}).status_code == 404


@pytest.mark.parametrize("mode", ["abort", "wait", "keep"])
def test_what_becomes_of_images_that_run(mode: str) -> None:
    sent: list[Any] = []
    scheduler = Scheduler(FakeStages(max_batch=2), sent.append)
    for id in "abc":
        scheduler.submit(Submit(id, "one", seeds=((0, 7),), diffusion={"steps": 3}))
    for _ in range(3):
        scheduler.turn()
    assert len([event for event in sent if isinstance(event, Started)]) == 2
    scheduler.control(Control("p", "pause", mode))
    while scheduler.busy:
        scheduler.turn()
    assert scheduler.running == 0
    assert [event.id for event in sent if isinstance(event, Controlled)] == ["p"]
    ended = [event.id for event in sent if isinstance(event, Finished)]
    failed = [event.id for event in sent if isinstance(event, Failed)]
    assert (ended, failed) == {"abort": ([], ["a", "b", "c"]), "wait": (["a", "b"], []), "keep": ([], [])}[
        mode
    ]
    scheduler.control(Control("r", "resume"))
    while scheduler.busy:
        scheduler.turn()
    ended = [event.id for event in sent if isinstance(event, Finished)]
    assert sorted(ended) == ([] if mode == "abort" else ["a", "b", "c"])
    assert len(set(ended)) == len(ended)
