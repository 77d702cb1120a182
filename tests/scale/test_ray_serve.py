"""The service on a local Ray cluster: the pixels of single calls, whatever replicas are lost."""

from __future__ import annotations

import base64
import io
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from blip3o_rt.embedded import embedded_checkpoint
from blip3o_rt.pipeline import Pipeline
from blip3o_rt.serve.messages import EngineOptions
from blip3o_rt.serve.server import ServerOptions

pytestmark = pytest.mark.exhaustive

REQUESTS = int(os.environ.get("BLIP3O_SERVE_REQUESTS", "200"))
PORT = 18_437
URL = f"http://127.0.0.1:{PORT}"
MODEL = {"device": "cpu", "dtype": "fp32"}
STEPS = 2
TWO = {"least": 2, "most": 2}
ONE_OR_TWO = {"least": 1, "most": 2, "requests": 1.0}
MIB = 2**20
ASKED = {"prompt": "a red circle on a blue background", "seed": 3, "steps": STEPS}


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline.load(**MODEL)


def deploy(planners: dict[str, Any], renderers: dict[str, Any], **options: Any) -> None:
    """Put an application in place of the one that runs, and wait until it is there."""
    from ray import serve

    from blip3o_rt.scale.ray_serve import Scale, application

    engine = EngineOptions({**MODEL, **options.pop("model", {})})
    fast = {"cpus": 0.1, "grow_seconds": 1.0, "shrink_seconds": 1.0}
    scales = [Scale(**fast, **given) for given in (planners, renderers)]
    serve.run(application(ServerOptions(engine, **options), *scales), blocking=False)


def running(kind: str) -> int:
    """Replicas of a deployment that run."""
    from ray import serve

    deployment = serve.status().applications["default"].deployments[kind]
    return deployment.replica_states.get("RUNNING", 0)


def wait_until(holds: Callable[[], bool], seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.2)


def started() -> bool:
    """Whether the HTTP proxy came up in the time that Ray gives it."""
    from ray import serve
    from ray.exceptions import GetTimeoutError

    try:
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    except (TimeoutError, GetTimeoutError):
        return False
    return True


@pytest.fixture(scope="module")
def service() -> Iterator[Any]:
    """Two planners and two renderers behind the HTTP surface."""
    patient = {f"RAY_SERVE_PROXY_{name}_TIMEOUT_S": "300" for name in ("READY_CHECK", "HEALTH_CHECK")}
    os.environ.update(patient, RAY_worker_niceness="0")  # of Ray's processes, however busy the machine is
    ray = pytest.importorskip("ray")
    serve = pytest.importorskip("ray.serve")
    httpx = pytest.importorskip("httpx")
    ray.init("local", num_cpus=2, object_store_memory=100 * MIB, include_dashboard=False, log_to_driver=False)
    wait_until(started)
    deploy(TWO, TWO)
    with httpx.Client(base_url=URL, timeout=600) as client:
        wait_until(lambda: client.get("/ready").status_code == 200)
        yield client
    serve.shutdown()
    ray.shutdown()


def image_of(response: Any) -> np.ndarray:
    assert response.status_code == 200, response.text
    data = base64.b64decode(response.json()["data"][0]["b64_json"])
    return np.asarray(Image.open(io.BytesIO(data)))


class Clients:
    """Threads that ask one after the other until the block ends; `images` are all that they were given."""

    def __init__(self, service: Any, threads: int = 4) -> None:
        self._service, self._ended = service, threading.Event()
        self._pool = ThreadPoolExecutor(threads)
        self.images: list[np.ndarray] = []
        self._asking = [self._pool.submit(self._ask) for _ in range(threads)]

    def _ask(self) -> None:
        while not self._ended.is_set():
            response = self._service.post("/v1/images/generations", json=ASKED)
            self.images.append(image_of(response))

    def __enter__(self) -> Clients:
        self.wait_for(4)
        return self

    def wait_for(self, more: int) -> None:
        """Wait for further images. Raises what a thread raised."""
        aim = len(self.images) + more
        wait_until(lambda: len(self.images) >= aim or any(one.done() for one in self._asking))

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for one in self._asking:
            one.result()
        self._pool.shutdown()


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


def drawn(pipeline: Pipeline) -> np.ndarray:
    """What a single call makes of ASKED."""
    return np.asarray(pipeline.generate(ASKED["prompt"], seed=ASKED["seed"], steps=STEPS)[0])


def test_an_ingress_that_is_replaced_loses_no_request(service: Any, pipeline: Pipeline) -> None:
    """Options of the server are arguments of the ingress alone."""
    expected = drawn(pipeline)
    with Clients(service) as clients:
        deploy(TWO, TWO, max_steps=STEPS)
        clients.wait_for(12)
    assert all(np.array_equal(image, expected) for image in clients.images)
    refused = service.post("/v1/images/generations", json={**ASKED, "steps": STEPS + 1})
    assert refused.status_code == 400  # by the new one


def test_a_rolling_update_of_weights_loses_no_request(
    service: Any, pipeline: Pipeline, tmp_path: Path
) -> None:
    """Every image is of the old weights or of the new, and at the end of the new."""
    folder = tmp_path / "new"
    shutil.copytree(embedded_checkpoint(), folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor * 1.03 for name, tensor in tensors.items()}, folder / "model.safetensors")
    old, new = drawn(pipeline), drawn(Pipeline.load(folder, **MODEL))
    assert not np.array_equal(old, new)
    with Clients(service) as clients:
        deploy(TWO, TWO, model={"path": str(folder)})
        clients.wait_for(12)
    assert np.array_equal(image_of(service.post("/v1/images/generations", json=ASKED)), new)
    kinds = [(np.array_equal(image, old), np.array_equal(image, new)) for image in clients.images]
    assert set(kinds) == {(True, False), (False, True)}
    wait_until(lambda: service.get("/v1/models").json()["data"][0]["id"] == "new")


def test_it_grows_under_load_and_shrinks_after(service: Any, pipeline: Pipeline) -> None:
    expected = drawn(pipeline)
    deploy(ONE_OR_TWO, ONE_OR_TWO)
    wait_until(lambda: (running("planner"), running("renderer")) == (1, 1))
    with Clients(service, 10) as clients:
        wait_until(lambda: (running("planner"), running("renderer")) == (2, 2))
    wait_until(lambda: (running("planner"), running("renderer")) == (1, 1))
    assert all(np.array_equal(image, expected) for image in clients.images)
