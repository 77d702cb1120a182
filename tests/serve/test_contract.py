"""Requests made of the OpenAPI description: no answer that it does not name, and no lost request."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from blip3o_rt.serve.client import Limits

pytestmark = pytest.mark.exhaustive

KEY = "a-key-of-one-of-the-users"
# Files in requests are strings to a schema, which does not say that they must be images.
CONFIG = f"""
headers = {{ Authorization = "Bearer {KEY}" }}
request-timeout = 60
seed = 1
color = false
suppress-health-check = ["too_slow"]

[[operations]]
include-path-regex = "(edits|jobs)$"
checks.positive_data_acceptance.enabled = false
"""


# Edits apart: schemathesis fails itself where it makes files of random wrong kinds, and they link to nothing.
@pytest.mark.parametrize(
    "choice",
    [
        "--exclude-path-regex edits$",
        "--include-path-regex edits$ --phases examples,coverage",
        "--include-path-regex edits$ --phases fuzzing --mode positive",
    ],
)
def test_schemathesis_finds_nothing(choice: str, start: Any, tmp_path: Path) -> None:
    pytest.importorskip("schemathesis")
    (tmp_path / "keys").write_text(KEY)
    limits = Limits(queue=200, client_queue=200)
    server = start(keys=tmp_path / "keys", limits=limits, max_pixels=100_000).wait_ready()
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    # 30 requests of every operation, in itself and in sequences; the same ones every time
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json"]
    found = subprocess.run(
        [*command, "--max-examples", "30", *choice.split()],
        capture_output=True,
        text=True,
        timeout=1200,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ""},
    )
    assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-2000:]
    print(found.stdout)
    server.wait_until(lambda: server.health()["running"] + server.health()["waiting"] == 0)
    assert server.health()["engine_restarts"] == 0
