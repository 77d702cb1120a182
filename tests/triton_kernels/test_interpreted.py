"""The Triton kernels, interpreted on the CPU, against the ops' references in float64.

`make test` interprets every fifth case of an op, of both dtypes; the rest is exhaustive.
"""

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


@pytest.fixture(
    scope="module",
    params=[pytest.param(5, id="some"), pytest.param(1, id="all", marks=pytest.mark.exhaustive)],
)
def step(request: pytest.FixtureRequest) -> int:
    """Every which case is interpreted."""
    return int(request.param)


@pytest.fixture(scope="module")
def lines(step: int) -> list[dict[str, Any]]:
    return interpreted.run(*(f"{op}:{step}" for op in interpreted.OPS), interpreted.ROWS, interpreted.GATED)


@pytest.mark.parametrize("op", interpreted.OPS)
def test_matches_reference(lines: list[dict[str, Any]], step: int, op: str, case_text: str) -> None:
    found = {
        line["case"]: line["errors"] for line in lines if line.get("op") == op and case_text in line["case"]
    }
    assert case_text or len(found) == len(interpreted.cases(op)[::step])
    assert {case: errors for case, errors in found.items() if errors} == {}


def test_rows_of_a_product_are_independent(lines: list[dict[str, Any]]) -> None:
    """Whatever tile a row is in, and whichever others are there: the bits of the row alone."""
    assert [line["errors"] for line in lines if line["case"] == interpreted.ROWS] == [[]]


def test_a_gated_product_has_the_bits_of_its_parts(lines: list[dict[str, Any]]) -> None:
    assert [line["errors"] for line in lines if line["case"] == interpreted.GATED] == [[]]


@pytest.mark.exhaustive
def test_images_of_a_step_have_the_bits_of_each_alone() -> None:
    """At different steps, of different sizes and prompts, on the batch-invariant product."""
    assert [line["errors"] for line in interpreted.run(interpreted.IMAGES)] == [[]]


def test_every_kernel_file_is_registered() -> None:
    helpers = {"__init__", "inverse_rms", "launch", "products"}
    assert {path.stem for path in KERNELS.glob("*.py")} - helpers == set(interpreted.OPS)
