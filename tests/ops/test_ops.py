"""Every implementation of every op against its reference in float64, within the op's stated tolerance."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

import blip3o_rt.validate.cases as cases_package
from blip3o_rt import ops
from blip3o_rt.ops import native
from blip3o_rt.validate.case import Case, assert_close, run, run_exact

CASES = {module.name for module in pkgutil.iter_modules(cases_package.__path__)}


def cases_of(op_name: str) -> ModuleType:
    return importlib.import_module(f"blip3o_rt.validate.cases.{op_name}")


def test_every_op_has_cases() -> None:
    assert set(ops.all_ops()) == CASES


def variants(implementation: str) -> list[str]:
    """An implementation by name; "cpu" once per instruction set of this machine."""
    module = native.cpu_module()
    if implementation == "cpu" and module is not None:
        return [f"cpu-{isa}" for isa in module.isas()]
    return [implementation]


def table() -> Iterator[Any]:
    for name, op in ops.all_ops().items():
        if name not in CASES:
            continue  # test_every_op_has_cases says so
        cases = list(cases_of(name).cases())
        for implementation in op.implementations:
            for variant in variants(implementation.name):
                for case in cases:
                    dtype = str(case.arguments[0].dtype).removeprefix("torch.")
                    yield pytest.param(name, variant, case, id=f"{name}-{variant}-{dtype}-{case.label}")


@pytest.mark.parametrize(("op_name", "variant", "case"), list(table()))
def test_matches_reference(op_name: str, variant: str, case: Case) -> None:
    op = ops.all_ops()[op_name]
    implementation, _, isa = variant.partition("-")
    found = op.named(implementation)
    device = found.device or "cpu"
    reason = found.available() or found.takes(device, case.arguments[0].dtype)
    if reason:
        pytest.skip(reason)
    if isa:
        previous = native.cpu().isa()
        native.cpu().set_isa(isa)
    try:
        results = run(op, implementation, case, device)
    finally:
        if isa:
            native.cpu().set_isa(previous)
    getattr(cases_of(op_name), "check", assert_close)(op, case, results, run_exact(op, case))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("op_name", sorted(ops.all_ops()))
def test_reference_runs_on_gpu(op_name: str) -> None:
    op = ops.all_ops()[op_name]
    for case in cases_of(op_name).cases():
        results = run(op, "torch", case, "cuda")
        getattr(cases_of(op_name), "check", assert_close)(op, case, results, run_exact(op, case))
