"""The Triton kernels, interpreted on the CPU, against the ops' references in float64."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tests.triton_kernels import interpreted

KERNELS = Path(__file__).parents[2] / "triton_kernels"
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton (requirements-dev.txt)"
)
CASES = [(op, interpreted.name_of(case)) for op in interpreted.OPS for case in interpreted.cases(op)]


@pytest.fixture(scope="module")
def found() -> dict[tuple[str, str], Any]:
    return {(line["op"], line["case"]): line["errors"] for line in interpreted.run(*interpreted.OPS)}


@pytest.mark.parametrize(("op", "case"), CASES, ids=[f"{op}-{case}" for op, case in CASES])
def test_matches_reference(found: dict[tuple[str, str], Any], op: str, case: str) -> None:
    assert found[op, case] == []


def test_every_kernel_file_is_registered() -> None:
    helpers = {"__init__", "inverse_rms", "launch", "products"}
    assert {path.stem for path in KERNELS.glob("*.py")} - helpers == set(interpreted.OPS)
