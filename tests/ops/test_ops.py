"""Every implementation of every op against its reference in float64, within the op's stated tolerance."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from blip3o_rt import ops
from blip3o_rt.measure.validate.case import Case
from blip3o_rt.measure.validate.sweep import cases_of, findings, ops_with_cases, refusal, selected, variants


def test_every_op_has_cases() -> None:
    assert set(ops.all_ops()) == ops_with_cases()


def table() -> Iterator[Any]:
    for name, op in ops.all_ops().items():
        if name not in ops_with_cases():
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
    with selected(variant) as name:
        implementation = op.named(name)
        device = implementation.device or "cpu"
        reason = refusal(op, implementation, case, device)
    if reason:
        pytest.skip(reason)
    assert not [found for found in findings(op, variant, case, device) if not found.passed]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("op_name", sorted(ops.all_ops()))
def test_reference_runs_on_gpu(op_name: str) -> None:
    op = ops.all_ops()[op_name]
    for case in cases_of(op_name).cases():
        assert not [found for found in findings(op, "torch", case, "cuda") if not found.passed]
