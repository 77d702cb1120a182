"""The service on a local Ray cluster: the pixels of single calls, whatever replicas are lost."""

from __future__ import annotations

import base64
import io
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from blip3o_rt.pipeline import Pipeline
from blip3o_rt.serve.messages import EngineOptions
from blip3o_rt.serve.server import ServerOptions

pytestmark = pytest.mark.exhaustive

REQUESTS = int(os.environ.get("BLIP3O_SERVE_REQUESTS", "200"))
PORT = 18_437
URL = f"http://127.0.0.1:{PORT}"
MODEL = {"device": "cpu", "dtype": "fp32"}
STEPS = 2


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline.load(**MODEL)


@pytest.fixture(scope="module")
def service() -> Iterator[Any]:
    """Two planners and two renderers behind the HTTP surface."""
    ray = pytest.importorskip("ray")
    serve = pytest.importorskip("ray.serve")
    from blip3o_rt.scale.ray_serve import Scale, application

    ray.init(num_cpus=8, object_store_memory=100 * 2**20, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    serve.run(application(ServerOptions(EngineOptions(MODEL)), Scale(2, 2), Scale(2, 2)), blocking=False)
    httpx = pytest.importorskip("httpx")
    end = time.monotonic() + 120
    while httpx.get(f"{URL}/ready").status_code != 200 and time.monotonic() < end:
        time.sleep(0.2)
    with httpx.Client(base_url=URL, timeout=600) as client:
        yield client
    serve.shutdown()
    ray.shutdown()


def image_of(response: Any) -> np.ndarray:
    assert response.status_code == 200, response.text
    data = base64.b64decode(response.json()["data"][0]["b64_json"])
    return np.asarray(Image.open(io.BytesIO(data)))


def replica(kind: str) -> psutil.Process:
    """A process of a deployment, below this one."""
    return next(
        process
        for process in psutil.Process().children(recursive=True)
        if f"#{kind}" in (title := " ".join(process.cmdline())) or f":{kind}" in title
    )


def test_it_answers_as_the_server_of_one_machine_does(service: Any) -> None:
    assert service.get("/health").json()["status"] == "ok"
    (card,) = service.get("/v1/models").json()["data"]
    assert card["id"] == "blip3o-next-shapes"
    refused = service.post("/v1/images/generations", json={"prompt": " "})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt")
    long = service.post("/v1/images/generations", json={"prompt": "red " * 5000})
    assert (long.status_code, long.json()["error"]["code"]) == (400, "invalid_prompt")
    assert "blip3o_images" in service.get("/metrics").text


def test_mixed_requests_while_replicas_are_killed(service: Any, pipeline: Pipeline) -> None:
    """Every request is answered, with the pixels of a single call."""
    reference = pipeline.generate("a red circle", steps=STEPS)[0]
    file = io.BytesIO()
    reference.save(file, "PNG")
    prompts = ["a red circle", "a blue square on a yellow background", "a green circle"]

    def ask(number: int) -> np.ndarray:
        if number % 4 == 3:
            return image_of(
                service.post(
                    "/v1/images/edits",
                    data={"prompt": "make it green", "seed": number % 8, "steps": STEPS},
                    files={"image": ("reference.png", file.getvalue(), "image/png")},
                )
            )
        body = {"prompt": prompts[number % 3], "seed": number % 8, "steps": STEPS}
        return image_of(service.post("/v1/images/generations", json=body))

    killed: list[str] = []

    def kill() -> None:
        for kind in ("renderer", "planner"):
            time.sleep(2)
            replica(kind).kill()
            killed.append(kind)

    killer = threading.Thread(target=kill)
    with ThreadPoolExecutor(12) as threads:
        killer.start()
        found = list(threads.map(ask, range(REQUESTS)))
    killer.join()
    assert killed == ["renderer", "planner"]
    expected: dict[tuple[str, int], np.ndarray] = {}
    for number, image in enumerate(found):
        prompt = "make it green" if number % 4 == 3 else prompts[number % 3]
        key = (prompt, number % 8)
        if key not in expected and number % 4 == 3:
            expected[key] = np.asarray(pipeline.edit(prompt, reference, seed=key[1], steps=STEPS)[0])
        elif key not in expected:
            expected[key] = np.asarray(pipeline.generate(prompt, seed=key[1], steps=STEPS)[0])
        assert np.array_equal(image, expected[key]), number
