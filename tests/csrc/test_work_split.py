"""How the CPU kernels split their work among up to 64 threads, simulated on a machine with fewer."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from torch import Tensor

from blip3o_rt import ops
from blip3o_rt.measure.cases import cases_of
from blip3o_rt.measure.cases.model_shapes import op_shapes
from blip3o_rt.measure.random_checkpoint import preset
from blip3o_rt.measure.validate.case import Case, run
from blip3o_rt.measure.validate.sweep import findings, refusal
from blip3o_rt.ops import native

from .emulated.kernels import EmulatedKernels, build

COMPILER = os.environ.get("CXX", "g++")
POOL = Path(__file__).parent / "emulated" / "split_pool.cpp"
MOST_THREADS = 64
MOST_BYTES = 2**20  # of a tensor that is sent
SMALL = 2**16  # bytes of a tensor of a case that is run
WITH_KERNELS = [name for name, op in ops.all_ops().items() if "cpu" in op.implementation_names]

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason="needs a C++ compiler"),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(COMPILER, tmp_path_factory.mktemp("split"), POOL)


@pytest.fixture
def splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the pool notes how it would split what it does not run."""
    monkeypatch.setenv("BLIP3O_SPLITS", str(tmp_path / "splits"))
    return tmp_path / "splits"


@pytest.fixture
def kernels(program: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Calls of the CPU kernels go to those with the other pool."""
    module = EmulatedKernels([str(program)], MOST_BYTES)
    monkeypatch.setattr(native, "cpu", lambda: module)
    monkeypatch.setattr(native, "cpu_module", lambda: module)
    monkeypatch.setattr(native, "cpu_unavailable", lambda: None)
    yield
    module.close()


def tensors_of(case: Case) -> list[Tensor]:
    return [value for value in (*case.arguments, *case.options.values()) if isinstance(value, Tensor)]


def cases_with_a_kernel(name: str, cases: Iterable[Case]) -> list[Case]:
    op = ops.all_ops()[name]
    return [case for case in cases if refusal(op, op.named("cpu"), case, "cpu") is None]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", WITH_KERNELS)
def test_no_byte_is_written_by_two_threads(name: str) -> None:
    """Nor does a thread read what another writes: each begins with the memory as it was before the call."""
    small = [
        case
        for case in cases_with_a_kernel(name, cases_of(name))
        if all(value.untyped_storage().nbytes() <= SMALL for value in tensors_of(case))
    ]
    assert small
    failed = [
        f"{case.label} ({case.dtype}): {finding}"
        for case in small
        for finding in findings(ops.all_ops()[name], "cpu", case)
        if not finding.passed
    ]
    assert not failed


@pytest.mark.usefixtures("splits", "kernels")
def test_every_thread_has_work_where_there_is_enough(splits: Path) -> None:
    """At the published shapes as many threads are busy as there are, or as there are pieces of work."""
    kernels = 0
    for shape in op_shapes(preset("published"), (1, 8)):
        if shape.op in WITH_KERNELS:
            for case in cases_with_a_kernel(shape.op, [shape.make(shape.dtypes[-1])]):
                splits.write_text("")
                run(ops.all_ops()[shape.op], "cpu", case)
                for line in splits.read_text().splitlines():
                    units, grain, *busy = map(int, line.split())
                    pieces = -(-units // grain)
                    assert busy == [min(threads, pieces) for threads in range(1, MOST_THREADS + 1)], shape
                    kernels += 1
    assert kernels > 30
