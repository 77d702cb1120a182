"""The CUDA kernels' logic on the CPU, thread by thread, against the ops' references in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from blip3o_rt import ops
from blip3o_rt.ops import native
from blip3o_rt.validate.case import Case, run_exact
from blip3o_rt.validate.sweep import cases_of
from tests.csrc.simt.build import SimtCompiler
from tests.csrc.simt.cases import OPS, errors


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> SimtCompiler:
    return SimtCompiler(tmp_path_factory.mktemp("simt"))


@pytest.fixture(scope="module")
def kernels(compiler: SimtCompiler) -> dict[str, Any]:
    return {op: compiler.build(op) for op in OPS}


def table() -> Iterator[Any]:
    for op in OPS:
        for case in cases_of(op).cases():
            dtype = str(case.arguments[0].dtype).removeprefix("torch.")
            yield pytest.param(op, case, id=f"{op}-{dtype}-{case.label}")


@pytest.mark.parametrize(("op", "case"), list(table()))
def test_matches_reference(
    kernels: dict[str, Any], monkeypatch: pytest.MonkeyPatch, op: str, case: Case
) -> None:
    monkeypatch.setattr(native, "cuda", lambda: kernels[op])
    exact = run_exact(ops.all_ops()[op], case)
    for descending in (False, True):
        kernels[op].set_descending(descending)
        assert errors(op, case, exact) == []


def test_every_kernel_file_is_tested() -> None:
    registered = {name for name, op in ops.all_ops().items() if "cuda" in op.implementation_names}
    assert set(OPS) == registered
