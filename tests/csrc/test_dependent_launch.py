"""A kernel that begins while another still runs touches nothing too early: table, simulation, token step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from blip3o_rt import ops
from blip3o_rt.graphs import GraphRunner
from blip3o_rt.measure.cases import cases_of
from blip3o_rt.measure.validate.case import Case, copies, outputs, random
from blip3o_rt.ops import native
from tests.ar.test_graph import make_engine
from tests.captured_graph import CapturedGraphs
from tests.csrc.hazards import HAZARDS, WEIGHTS
from tests.csrc.simt.build import SimtCompiler, file_of
from tests.csrc.simt.cases import OPS, size
from tests.csrc.test_cuda_faults import whole_source_of
from tests.planting import plant

LARGEST = 30_000  # elements of a case
WAIT = "    wait_for_previous_kernel();\n"
Seen = dict[str, list[Tensor]]


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> SimtCompiler:
    return SimtCompiler(tmp_path_factory.mktemp("dependent"))


@pytest.fixture(scope="module")
def kernels(compiler: SimtCompiler) -> Callable[[str], Any]:
    built: dict[str, Any] = {}

    def of(op: str) -> Any:
        file = file_of(op)
        if file not in built:
            built[file] = compiler.build(file)
        return built[file]

    return of


def names_of(op: str) -> list[str]:
    return list(inspect.signature(ops.all_ops()[op].reference).parameters)


def tensors_of(op: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> Seen:
    """The tensors that a kernel is given, by the names of the op's arguments."""
    named = dict(zip(names_of(op), arguments, strict=False)) | options
    listed = {name: value if isinstance(value, tuple) else (value,) for name, value in named.items()}
    found = {name: [v for v in values if isinstance(v, Tensor)] for name, values in listed.items()}
    return {name: tensors for name, tensors in found.items() if tensors}


def span(tensor: Tensor) -> tuple[int, int]:
    """Where a tensor begins in memory, and its bytes up to its last element."""
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), (last + 1) * tensor.element_size() if tensor.numel() else 0


def watched(op: str, kernels: Any, visible: frozenset[str], note: Callable[[Seen], None]) -> Any:
    """The op's kernel; until its wait, every argument but the visible ones is poison."""

    def call(*arguments: Any, **options: Any) -> None:
        seen = tensors_of(op, arguments, options)
        note(seen)
        hidden = [span(t) for name, tensors in seen.items() if name not in visible for t in tensors]
        kernels.set_produced(hidden)
        try:
            getattr(kernels, op)(*arguments, **options)
        finally:
            kernels.set_produced([])

    sizes = {name: getattr(kernels, name) for name in vars(kernels) if name.endswith("_workspace")}
    return SimpleNamespace(**{op: call}, **sizes)


def run(op: str, case: Case) -> list[Tensor] | None:
    """What the kernel makes of a case, as bytes; None for a case that it refuses."""
    implementation = ops.all_ops()[op].named("cuda")
    arguments, options = copies(case)
    bound = ops.all_ops()[op].bind(*arguments, **options)
    if implementation.takes("cuda", arguments[0].dtype) or implementation.refusal(bound):
        return None
    found = outputs(case, arguments, options, implementation.run(bound))
    return [output.contiguous().view(torch.uint8) for output in found]


def small_cases(op: str) -> list[Case]:
    return [case for case in cases_of(op) if size(case) <= LARGEST]


def differing(op: str, kernels: Any, monkeypatch: pytest.MonkeyPatch, visible: frozenset[str]) -> list[str]:
    """The cases that have other bits in a dependent launch, in either order of threads."""
    found = []
    for descending in (False, True):
        kernels.set_descending(descending)
        for case in small_cases(op):
            kernels.set_dependent_launches(False)
            monkeypatch.setattr(native, "cuda", lambda: kernels)
            expected = run(op, case)
            if expected is None:
                continue
            kernels.set_dependent_launches(True)
            run(op, case)  # the first of a chain waits for nothing
            monkeypatch.setattr(native, "cuda", lambda: watched(op, kernels, visible, lambda _: None))
            result = run(op, case) or []
            if not all(torch.equal(a, b) for a, b in zip(result, expected, strict=True)):
                found.append(case.label)
    kernels.set_dependent_launches(False)
    return found


def test_the_table_has_every_argument_of_every_kernel() -> None:
    assert sorted(HAZARDS) == sorted(OPS)
    for op, hazards in HAZARDS.items():
        parameters = inspect.signature(ops.all_ops()[op].reference).parameters.values()
        tensors = {p.name for p in parameters if "Tensor" in str(p.annotation)}
        assert hazards.all - {"scratch"} == tensors, op
        assert hazards.before <= WEIGHTS, op
        assert not hazards.before & hazards.writes, op


@pytest.mark.parametrize("op", OPS)
def test_what_kernels_write_is_not_touched_before_the_wait(
    kernels: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, op: str
) -> None:
    assert not differing(op, kernels(op), monkeypatch, HAZARDS[op].before)


def test_weights_are_read_before_the_wait(
    kernels: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where they may not be, the results are wrong: the poison is seen."""
    assert differing("row_linear", kernels("row_linear"), monkeypatch, frozenset())


@pytest.mark.parametrize("op", OPS)
def test_kernels_write_what_the_table_says(
    kernels: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, op: str
) -> None:
    changed: set[str] = set()
    given: list[tuple[Seen, Seen]] = []

    def note(seen: Seen) -> None:
        read = {t.data_ptr() for name in HAZARDS[op].reads for t in seen.get(name, [])}
        for out in seen.get("out", []):
            if out.data_ptr() not in read:
                out.fill_(-1)  # what is not read does not matter
        given.append((seen, {name: [t.clone() for t in tensors] for name, tensors in seen.items()}))

    monkeypatch.setattr(native, "cuda", lambda: watched(op, kernels(op), HAZARDS[op].all, note))
    for case in small_cases(op):
        run(op, case)
    for seen, before in given:
        changed |= {
            name
            for name, tensors in seen.items()
            for now, then in zip(tensors, before[name], strict=True)
            if not torch.equal(now.contiguous().view(torch.uint8), then.contiguous().view(torch.uint8))
        }
    aliases = {"q"} if op == "paged_decode_attention" else set()  # the result may be written over the queries
    assert changed - aliases == HAZARDS[op].writes


def test_the_first_of_a_chain_and_code_that_does_not_wait_are_launched_in_order(
    kernels: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    built = kernels("silu_mul")
    monkeypatch.setattr(native, "cuda", lambda: built)

    def early_ones(calls: int) -> int:
        before = built.dependent_launches()
        for _ in range(calls):
            ops.all_ops()["silu_mul"].named("cuda").run(ops.silu_mul.bind(random(1, 2, 16)))
        return int(built.dependent_launches() - before)

    assert early_ones(2) == 0
    built.set_dependent_launches(True)
    assert early_ones(3) == 2
    built.set_ptx_version(89)  # code of an older GPU, compiled for this one
    assert early_ones(2) == 0
    built.set_ptx_version(90)
    built.set_dependent_launches(False)
    assert early_ones(2) == 0


NORM = """        scale = norm_packs ? row_inverse_rms<kWidestPack<__nv_bfloat16>>(a, lane.row)
                           : row_inverse_rms<1>(a, lane.row);
    }
"""
LENGTH = "    const int length = context_length(a, sequence);\n    TokenPlace"
SAMPLER = "    const Sampler sampler(a, row, index_bits);\n"
RETURN = "    if (column >= a.out.width) return;\n"
EARLY_STORE = "    if (threadIdx.x == 0) static_cast<T*>(a.out.data)[0] = from_float<T>(1.0f);\n"
FAULTS = [
    ("row_linear", [(WAIT, "")]),
    ("norm_row_linear", [(WAIT, ""), (NORM, NORM + WAIT)]),  # the rows' sizes are read too early
    ("row_linear", [(WAIT, "    if (threadIdx.x < 32) wait_for_previous_kernel();\n")]),
    ("decode_attention", [(WAIT, ""), (LENGTH, LENGTH.replace("\n", "\n" + WAIT, 1))]),
    ("sample_tokens", [(WAIT, ""), (SAMPLER, SAMPLER + WAIT)]),
    ("silu_mul", [(WAIT, ""), (RETURN, RETURN + WAIT)]),  # some threads end without it
    ("rms_norm", [(WAIT, EARLY_STORE + WAIT)]),
    ("qk_norm_rope_append", [(WAIT, ""), ("    const bool valid =", WAIT + "    const bool valid =")]),
]


@pytest.mark.exhaustive
@pytest.mark.parametrize(("op", "changes"), FAULTS, ids=[f"{op}-{i}" for i, (op, _) in enumerate(FAULTS)])
def test_planted_faults_are_caught(
    compiler: SimtCompiler, monkeypatch: pytest.MonkeyPatch, op: str, changes: list[tuple[str, str]]
) -> None:
    source = whole_source_of(op)
    for correct, fault in changes:
        source = plant(source, correct, fault)
    faulty = compiler.build(op, source, f"{op}_{FAULTS.index((op, changes))}")
    try:
        found = differing(op, faulty, monkeypatch, HAZARDS[op].before)
    except RuntimeError as error:
        found = [str(error)] if "wait" in str(error) else []
    assert found


def calls_of_a_token_step() -> Iterator[list[Any]]:
    """The calls of every captured pass of a small decoder: named tuples of addresses."""
    graphs = CapturedGraphs()
    make_engine(GraphRunner(graphs)).capture()
    for capture in graphs._written:
        yield [call.args[0] for call in capture.calls]


def test_no_call_of_a_token_step_writes_what_another_reads_before_its_wait() -> None:
    """The calls are those of the ops, whichever kernels serve them."""

    def storages(call: Any, names: frozenset[str]) -> set[int]:
        values = [getattr(call, name) for name in names if name != "scratch"]
        return {value.storage.cdata for value in values if value is not None}

    for calls in calls_of_a_token_step():
        named = [(call, HAZARDS[type(call).__name__]) for call in calls]
        written = {storage for call, hazards in named for storage in storages(call, hazards.writes)}
        early = {storage for call, hazards in named for storage in storages(call, hazards.before)}
        assert early
        assert written
        assert not early & written
