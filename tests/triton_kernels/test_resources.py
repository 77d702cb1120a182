"""No Triton kernel takes more registers or shared memory than the table says, and none spills.

`make test` compiles two of them; the rest is exhaustive.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs triton (requirements-dev.txt)")

from tests.triton_kernels import resources

TABLE: dict[str, Any] = json.loads(resources.TABLE.read_text())
QUICK = {"bf16 dit: gated_add_gated_add", "bf16 dit: relu_linear_attention_states"}
NAMES = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.exhaustive) for name in TABLE["kernels"]
]


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, resources.Launch]:
    return resources.published_launches()


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def test_table_is_complete(launches: dict[str, resources.Launch]) -> None:
    assert sorted(launches) == sorted(TABLE["kernels"])


@pytest.mark.parametrize("name", NAMES)
def test_takes_no_more_than_recorded(launches: dict[str, resources.Launch], name: str) -> None:
    found = resources.versions()
    if any(found[tool] != TABLE[tool] for tool in found):
        recorded = {tool: TABLE[tool] for tool in found}
        pytest.skip(f"the table is of {recorded}, here is {found}: they allocate registers differently")
    recorded, now = TABLE["kernels"][name], launches[name].compile()
    assert now.stack == 0
    assert now.registers <= recorded["registers"]
    assert now.shared <= recorded["shared"]
