"""What docs/serving.md and the README say to type, run as it stands; and what the dashboard asks for."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from blip3o_rt.cli import main
from blip3o_rt.pipeline import Pipeline
from blip3o_rt.serve.client import Limits
from blip3o_rt.serve.messages import EngineOptions
from blip3o_rt.serve.server import ServerOptions
from tests.serve.conftest import RunningServer

ROOT = Path(__file__).parents[2]
PROMPT = "a red circle on a blue background"


def blocks(name: str, language: str) -> list[str]:
    """The code blocks of a file of the documentation."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


CURL = [
    block[block.index("curl ") :]
    for name in ("docs/serving.md", "README.md")
    for block in blocks(name, "sh")
    if "curl " in block
]
PYTHON = blocks("docs/serving.md", "python")


@pytest.fixture(scope="module")
def real() -> Iterator[RunningServer]:
    server = RunningServer(ServerOptions(EngineOptions(), port=0)).wait_ready()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def expected() -> dict[str, bytes]:
    pipeline = Pipeline.load()
    drawn = pipeline.generate(PROMPT, seed=7)[0]
    edited = pipeline.edit("make the circle green", drawn, seed=7)[0]
    file = io.BytesIO()
    drawn.save(file, "PNG")
    return {"generations": drawn.tobytes(), "edits": edited.tobytes(), "image.png": file.getvalue()}


def samples(text: str) -> bytes:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))).tobytes()


def test_there_is_a_line_for_every_route_that_draws() -> None:
    assert {"generations", "edits", "jobs"} <= set(re.findall(r"/v1/(?:images/)?(\w+)", "".join(CURL)))
    assert any("stream" in block for block in CURL)


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize("block", CURL)
def test_curl_lines_draw(block: str, real: RunningServer, expected: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / ".curlrc").write_text(
        f'connect-to = "127.0.0.1:8000:{real.url.removeprefix("http://")}"\nfail-with-body\nsilent\n'
    )
    (tmp_path / "image.png").write_bytes(expected["image.png"])
    found = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env={**os.environ, "CURL_HOME": str(tmp_path)},
    )
    assert found.returncode == 0, found.stdout + found.stderr
    if "stream" in block:
        names = re.findall(r"^event: image_generation\.(\w+)$", found.stdout, re.MULTILINE)
        assert names == ["partial_image", "partial_image", "completed"]
    elif "jobs" in block:
        assert json.loads(found.stdout)["status"] == "queued"
    else:
        kind = "edits" if "edits" in block else "generations"
        assert samples(json.loads(found.stdout)["data"][0]["b64_json"]) == expected[kind]


@pytest.mark.parametrize("block", PYTHON)
def test_python_blocks_draw(
    block: str, real: RunningServer, expected: dict[str, bytes], tmp_path: Path
) -> None:
    block = block.replace("http://127.0.0.1:8000", real.url)
    if "openai" in block:
        block += "\nprint(drawn.data[0].b64_json)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run(
        [sys.executable, "-c", block], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert found.returncode == 0, found.stderr
    if "openai" in block:
        assert samples(found.stdout) == expected["generations"]
    else:
        assert Image.open(tmp_path / "circle.png").size == (64, 64)


def test_the_dashboard_asks_for_metrics_that_there_are(start: Any) -> None:
    dashboard: dict[str, Any] = json.loads((ROOT / "deploy" / "grafana.json").read_text(encoding="utf-8"))
    asked = {
        name
        for panel in dashboard["panels"]
        for target in panel.get("targets", ())
        for name in re.findall(r"blip3o_\w+", target["expr"])
    }
    server = start(limits=Limits(queue=1)).wait_ready()
    for n, status in ((1, 200), (2, 429)):  # a series begins with the first event that it counts
        body = {"prompt": "a circle", "steps": 2, "n": n}
        assert server.http.post("/v1/images/generations", json=body).status_code == status
    server.wait_until(lambda: server.metric("blip3o_token_passes_total") > 0)
    known = set(re.findall(r"^(blip3o_\w+)", server.http.get("/metrics").text, re.MULTILINE))
    assert len(asked) > 10
    assert asked <= known


def test_every_option_that_is_named_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["serve"], ["bench", "serve"]):
        with pytest.raises(SystemExit):
            main([*words, "--help"])
    known = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    text = "".join((ROOT / name).read_text() for name in ("docs/serving.md", "deploy/blip3o-rt.service"))
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
    assert len(named) > 15
    assert named <= known
