"""Timed ops: shapes of the model, checks that catch a wrong kernel, inputs that no cache holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from blip3o_rt import ops
from blip3o_rt.measure.bench import ops as bench_ops
from blip3o_rt.measure.bench.ops import Rotation, time_shape
from blip3o_rt.measure.cases.model_shapes import op_shapes
from blip3o_rt.measure.random_checkpoint import preset
from blip3o_rt.measure.validate.case import Case, random
from blip3o_rt.ops.user_kernels import load_kernels

CPU = torch.device("cpu")
TINY = preset("tiny")
SHAPES = {f"{shape.op}, {shape.label}": shape for shape in op_shapes(TINY, (1, 3))}
WRONG = """
import torch
from blip3o_rt import ops

@ops.silu_mul.implementation("wrong", device="cpu")
def silu_mul(gate_up, *, out=None):
    gate, up = gate_up.chunk(2, dim=-1)
    return gate * up

@ops.silu_mul.implementation("raises", device="cpu")
def broken(gate_up, *, out=None):
    raise ValueError("not today")
"""


def test_every_op_has_a_shape_at_every_geometry() -> None:
    assert {shape.op for shape in SHAPES.values()} == set(ops.all_ops())
    assert {shape.op for shape in op_shapes(preset("published"), (1,))} == set(ops.all_ops())


@pytest.mark.parametrize("name", ["triton", "scaled_mm"])
def test_every_kernel_takes_a_shape_to_be_timed_at(name: str) -> None:
    kernels = {op: op.named(name) for op in ops.all_ops().values() if name in op.implementation_names}
    assert kernels
    for op, kernel in kernels.items():
        shapes = [shape for shape in SHAPES.values() if shape.op == op.name]
        cases = [shape.make(dtype) for shape in shapes for dtype in shape.dtypes]
        assert any(kernel.refusal(op.bind(*case.arguments, **case.options)) is None for case in cases), op


FIRST = {shape.op: name for name, shape in reversed(SHAPES.items())}  # of every op


@pytest.mark.parametrize(
    "name",
    [name if name in FIRST.values() else pytest.param(name, marks=pytest.mark.exhaustive) for name in SHAPES],
)
def test_every_implementation_is_right_and_timed(name: str) -> None:
    shape = SHAPES[name]
    for dtype in shape.dtypes:
        entries = list(time_shape(ops.all_ops()[shape.op], shape, dtype, CPU, runs=1, limit=0.0))
        assert "torch" in {entry.implementation for entry in entries}
        for entry in entries:
            assert entry.ok, entry
            assert entry.error is not None
            assert entry.error <= (entry.bound or 0.0)
            assert entry.count == len(entry.samples) >= 1
            assert entry.bytes
            assert entry.note is None


def test_a_wrong_kernel_is_timed_and_named_wrong(tmp_path: Path) -> None:
    path = tmp_path / "kernel.py"
    path.write_text(WRONG)
    shape = next(shape for shape in SHAPES.values() if shape.op == "silu_mul")
    with load_kernels([path]):
        entries = {
            entry.implementation: entry
            for entry in time_shape(ops.silu_mul, shape, torch.float32, CPU, runs=1, limit=0.0)
        }
    assert not entries["wrong"].ok
    assert (entries["wrong"].error or 0.0) > (entries["wrong"].bound or 0.0)
    assert entries["wrong"].count >= 1
    assert not entries["raises"].ok
    assert entries["raises"].note == "raised ValueError: not today"
    assert (entries["raises"].count, entries["raises"].median) == (0, None)
    assert entries["torch"].ok


def work_of(op_name: str, text: str, dtype: torch.dtype = torch.bfloat16) -> tuple[int, int]:
    shape = next(s for name, s in SHAPES.items() if name.startswith(op_name) and text in name)
    case = shape.make(dtype)
    result = ops.all_ops()[op_name].reference(*case.arguments, **case.options)
    found = shape.work(case, result)
    return found.bytes, found.flops


def test_bytes_and_operations_by_hand() -> None:
    ar = TINY.ar
    rows, columns = 2 * ar.intermediate_size, ar.hidden_size
    expected = 2 * (rows * columns + 3 * columns + 3 * rows)
    assert work_of("row_linear", "decode x3: gate|up") == (expected, 2 * 3 * rows * columns)
    # Keys and values of 3 sequences, query and result; not the whole of the pages, nor the block table.
    context = 64 // 2 + 64
    bytes_read = 2 * (3 * context * 2 * ar.kv_size + 3 * 2 * ar.query_size)
    assert work_of("paged_decode_attention", "decode x3") == (bytes_read, 2 * 3 * context * 2 * ar.query_size)
    width = TINY.dit.width
    read_and_written = 2 * (3 * 2 * 64 * width) + 4 * width  # residual twice, x once; gate in float32
    assert work_of("gated_add", "dit") == (read_and_written, 0)


class Kernel:
    """Remembers the memory of the inputs of each call."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x.data_ptr())
        return x


@pytest.mark.parametrize("cache", [2**10, 2**16])
def test_inputs_return_only_when_the_caches_have_forgotten_them(
    cache: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_ops, "cache_bytes", lambda _: cache)
    monkeypatch.setattr(bench_ops, "MAX_COPIES", 16)
    rotation = Rotation(Case("", (random(1, 64),)), CPU)  # 256 bytes each
    copies = len(rotation.arguments)
    assert copies == min(16, 2 * cache // 256)
    fits = copies * 256 < 2 * cache
    taken, emptied = [], []
    for _ in range(2 * copies):
        (x,), _options = rotation.take()
        taken.append(x.data_ptr())
        emptied.append(rotation.emptied)
    assert len(set(taken[:copies])) == copies
    assert taken[:copies] == taken[copies:]
    assert emptied == [fits and place % copies == 0 for place in range(2 * copies)]


def test_the_last_level_cache_is_found() -> None:
    assert 2**15 <= bench_ops.cache_bytes(CPU) <= bench_ops.LARGEST_CACHE_BYTES


def test_sizes_of_caches(tmp_path: Path) -> None:
    def size(text: str) -> int:
        path = tmp_path / "size"
        path.write_text(text)
        return bench_ops._cache_size(path)

    assert [size(text) for text in ("32768K\n", "1M\n", "512\n", "")] == [2**25, 2**20, 512, 0]


@pytest.fixture(autouse=True)
def small_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Emptying real caches takes a while."""
    monkeypatch.setattr(bench_ops, "LARGEST_CACHE_BYTES", 2**15)
    monkeypatch.setattr(bench_ops, "MORE_RUNS", 1)
