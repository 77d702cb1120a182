"""Requests made of the OpenAPI description: no answer that it does not name, and no lost request."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serve.conftest import RunningServer

pytestmark = pytest.mark.exhaustive


# Files in requests are strings to a schema, which does not say that they must be images.
FILES = "(edits|jobs)$"


@pytest.mark.parametrize(
    "options",
    [
        ["--exclude-path-regex", FILES],
        ["--include-path-regex", FILES, "--exclude-checks", "positive_data_acceptance"],
    ],
)
def test_schemathesis_finds_nothing(options: list[str], server: RunningServer, tmp_path: Path) -> None:
    pytest.importorskip("schemathesis")
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", *options]
    # 30 requests of every operation, in itself and in sequences; the same ones every time
    command += ["--max-examples", "30", "--seed", "1", "--request-timeout", "60", "--no-color"]
    environment = {**os.environ, "PYTHONPATH": ""}
    found = subprocess.run(
        command, capture_output=True, text=True, timeout=900, cwd=tmp_path, env=environment
    )
    assert found.returncode == 0, found.stdout[-6000:]
    server.wait_until(lambda: server.health()["running"] + server.health()["waiting"] == 0)
    assert server.health()["engine_restarts"] == 0
