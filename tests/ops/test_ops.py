"""Every implementation of every op against its reference in float64, within the op's stated tolerance.

A test is an op, an implementation and a dtype; `-k rms_norm` picks an op, `--case "no rows"` some cases.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from blip3o_rt import ops
from blip3o_rt.measure.cases import cases_of, ops_with_cases
from blip3o_rt.measure.validate.case import Case, run_exact
from blip3o_rt.measure.validate.sweep import findings, refusal, selected, variants
from blip3o_rt.ops.dtypes import name_of
from blip3o_rt.ops.quantized import products_of_rows


def test_every_op_has_cases() -> None:
    assert set(ops.all_ops()) == ops_with_cases()


def table() -> Iterator[Any]:
    for name, op in ops.all_ops().items():
        if name not in ops_with_cases():
            continue  # test_every_op_has_cases says so
        for dtype in dict.fromkeys(case.dtype for case in cases_of(name)):
            for implementation in op.implementations:
                for variant in variants(implementation.name):
                    yield pytest.param(name, variant, dtype, id=f"{name}-{variant}-{name_of(dtype)}")


@functools.lru_cache(maxsize=1)  # one op's variants follow each other
def exact_cases(op_name: str, dtype: torch.dtype) -> list[tuple[Case, list[Tensor]]]:
    """The cases of an op and a dtype, with what the reference makes of them in float64."""
    cases = [case for case in cases_of(op_name) if case.dtype == dtype]
    return [(case, run_exact(ops.all_ops()[op_name], case)) for case in cases]


@pytest.mark.parametrize(("op_name", "variant", "dtype"), list(table()))
def test_matches_reference(op_name: str, variant: str, dtype: torch.dtype, case_text: str) -> None:
    op = ops.all_ops()[op_name]
    with selected(variant) as name:
        implementation = op.named(name)
    device = implementation.device or "cpu"
    failed: list[str] = []
    reasons: list[str] = []
    compared = 0
    for case, exact in exact_cases(op_name, dtype):
        if case_text not in case.label:
            continue
        with selected(variant):
            reason = refusal(op, implementation, case, device)
        if reason is not None:
            reasons.append(reason)
            continue
        compared += 1
        found = findings(op, variant, case, device, exact)
        failed += [f"{case.label}: {finding}" for finding in found if not finding.passed]
    if not compared:
        pytest.skip(reasons[0] if reasons else f"no case with {case_text!r} in its label")
    assert not failed, "\n".join([f"{len(failed)} findings in {compared} cases", *failed])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("op_name", sorted(ops.all_ops()))
def test_reference_runs_on_gpu(op_name: str) -> None:
    op = ops.all_ops()[op_name]
    for case in cases_of(op_name):
        assert not [found for found in findings(op, "torch", case, "cuda") if not found.passed]


def test_the_reference_of_products_holds_one_converted_block() -> None:
    alive: list[weakref.ref[Tensor]] = []

    def blocks() -> Iterator[Tensor]:
        for _ in range(3):
            assert all(block() is None for block in alive)
            block = torch.ones(4, 8)
            alive.append(weakref.ref(block))
            yield block
            del block

    assert products_of_rows(torch.ones(2, 8), blocks(), None, None).shape == (2, 12)
