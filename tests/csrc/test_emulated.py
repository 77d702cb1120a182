"""The torch-free kernels for aarch64 get the op table's cases right, under user-mode emulation."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest

from blip3o_rt import ops
from blip3o_rt.measure.cases import cases_of
from blip3o_rt.measure.validate.sweep import findings, refusal
from blip3o_rt.ops import native

from .emulated.kernels import EmulatedKernels, build

COMPILER = os.environ.get("BLIP3O_AARCH64_CXX", "aarch64-linux-gnu-g++")
EMULATOR, LIBRARIES = "qemu-aarch64-static", "/usr/aarch64-linux-gnu"
MISSING = [tool for tool in (COMPILER, EMULATOR) if shutil.which(tool) is None]
WITH_KERNELS = [name for name, op in ops.all_ops().items() if "cpu" in op.implementation_names]

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}"),
]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmulatedKernels]:
    program = build(COMPILER, tmp_path_factory.mktemp("aarch64"))
    module = EmulatedKernels([EMULATOR, "-L", LIBRARIES, str(program)])
    yield module
    module.close()


@pytest.fixture
def emulated(kernels: EmulatedKernels, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Calls of the CPU kernels go to the emulated ones."""
    monkeypatch.setattr(native, "cpu", lambda: kernels)
    monkeypatch.setattr(native, "cpu_module", lambda: kernels)
    monkeypatch.setattr(native, "cpu_unavailable", lambda: None)
    for op in ops.all_ops().values():
        op.choose_again()
    yield
    monkeypatch.undo()
    for op in ops.all_ops().values():
        op.choose_again()


def test_every_op_with_a_kernel_is_there(kernels: EmulatedKernels) -> None:
    composed = {"decode_attention"}
    assert set(WITH_KERNELS) - composed == set(kernels.parameters)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("op_name", WITH_KERNELS)
def test_matches_reference(op_name: str) -> None:
    op = ops.all_ops()[op_name]
    implementation = op.named("cpu")
    cases = [case for case in cases_of(op_name) if refusal(op, implementation, case, "cpu") is None]
    assert cases
    failed = [
        f"{case.label} ({case.dtype}): {finding}"
        for case in cases
        for finding in findings(op, "cpu", case)
        if not finding.passed
    ]
    assert not failed
