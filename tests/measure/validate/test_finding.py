"""The measure of an op's tolerance: what rounding leaves, and what it does not forgive."""

from __future__ import annotations

import math

import pytest
import torch

from blip3o_rt import ops
from blip3o_rt.measure.cases.image import nearest_code_check
from blip3o_rt.measure.cases.norm import rms_norm_check
from blip3o_rt.measure.validate.case import Case, random
from blip3o_rt.measure.validate.finding import Finding, compare, compare_output, half_unit, worst_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_to_nearest_is_no_error(dtype: torch.dtype) -> None:
    exact = torch.cat([random(0, 5000).double(), torch.tensor([0.0, 1.0, 2.0**-130, -1e-30, 3e38])])
    assert worst_error(exact.to(dtype), exact) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("number", [1.0, 1.5, 2.0, 255.0, 1e-20])
def test_half_a_unit_is_half_the_way_to_the_next_number(dtype: torch.dtype, number: float) -> None:
    here = torch.tensor([number]).to(dtype)
    following = torch.nextafter(here, torch.full_like(here, torch.inf))
    assert half_unit(here.double(), dtype).item() == (following.double() - here.double()).item() / 2


def test_one_unit_in_the_last_place_shows() -> None:
    exact = random(1, 1000).double()
    rounded = exact.bfloat16()
    off = torch.nextafter(rounded, torch.full_like(rounded, torch.inf))
    assert worst_error(off, exact) > 1e-3


def test_error_beyond_rounding_is_relative_to_value_and_rms() -> None:
    exact = torch.tensor([3.0, 4.0], dtype=torch.float64)
    result = torch.tensor([3.0, 4.0 + 1e-3], dtype=torch.float64)
    assert worst_error(result, exact) == pytest.approx(1e-3 / (4 + math.sqrt(12.5)), rel=1e-6)


@pytest.mark.parametrize("result", [math.nan, math.inf])
def test_what_is_not_finite_fails(result: float) -> None:
    exact = torch.ones(3, dtype=torch.float64)
    finding = compare_output(ops.silu_mul, torch.tensor([1.0, result, 1.0]), exact)
    assert not finding.passed


def test_no_number_must_be_where_the_exact_one_is_none() -> None:
    exact = torch.tensor([torch.nan, 1.0], dtype=torch.float64)
    assert compare_output(ops.silu_mul, exact.float(), exact).passed
    for result in ([1.0, 1.0], [torch.nan, torch.nan], [torch.nan, 2.0]):
        assert not compare_output(ops.silu_mul, torch.tensor(result), exact).passed


def test_equal_infinities_pass() -> None:
    exact = torch.tensor([torch.inf, 1.0], dtype=torch.float64)
    assert compare_output(ops.silu_mul, exact.float(), exact).passed


def test_nothing_to_compare_passes() -> None:
    assert compare_output(ops.silu_mul, torch.empty(0, 4), torch.empty(0, 4).double()).passed


def test_another_shape_or_kind_fails_in_words() -> None:
    exact = torch.ones(3, dtype=torch.float64)
    shape = compare_output(ops.silu_mul, torch.ones(1), exact)
    assert not shape.passed
    assert shape.detail == "shape [1], not [3]"
    kind = compare_output(ops.sample_tokens, torch.ones(3), torch.ones(3, dtype=torch.int64))
    assert not kind.passed
    assert "float32" in kind.detail


def test_integers_are_counted() -> None:
    expected = torch.tensor([1, 2, 3])
    assert compare_output(ops.sample_tokens, torch.tensor([1, 2, 3]), expected).passed
    assert compare_output(ops.sample_tokens, torch.tensor([1, 0, 0]), expected).found == 2


def test_outputs_are_named() -> None:
    case = Case("", (torch.ones(2),), {"residual": torch.ones(2)}, written=("residual", 0))
    tensors = [torch.ones(2, dtype=torch.float64)] * 3
    names = [finding.output for finding in compare(ops.silu_mul, case, tensors, tensors)]
    assert names == ["result", "residual", "0"]


def test_a_finding_without_a_figure_does_not_pass() -> None:
    assert not Finding("", math.nan, math.inf).passed
    assert Finding("", 1.0, 1.0).passed


def test_a_later_code_of_two_equal_ones_is_wrong() -> None:
    codes = torch.eye(4).repeat(2, 1)
    case = Case("", (torch.eye(4), codes))
    first, later = torch.arange(4), torch.arange(4) + 4
    for chosen, passes in ((first, True), (later, False), (first[:2], False), (first + 5, False)):
        found = nearest_code_check(ops.nearest_code, case, [chosen], [first])
        assert all(finding.passed for finding in found) == passes


def test_the_norm_of_a_rounded_residual_is_compared_with_that_residual() -> None:
    """In float64 the residual is not rounded; the contract rounds it before the norm."""
    x, residual = random(0, 2, 64, dtype=torch.bfloat16), random(1, 2, 64, dtype=torch.bfloat16)
    case = Case("", (x, torch.ones(64).bfloat16(), 1e-6), {"residual": residual}, written=("residual",))
    exact_sum = x.double() + residual.double()
    exact = [ops.rms_norm.reference(exact_sum, case.arguments[1].double(), 1e-6), exact_sum]
    summed = exact_sum.bfloat16()
    result = ops.rms_norm.reference(summed, case.arguments[1], 1e-6)
    assert all(finding.passed for finding in rms_norm_check(ops.rms_norm, case, [result, summed], exact))
    assert not compare(ops.rms_norm, case, [result, summed], exact)[0].passed
    unrounded = ops.rms_norm.reference(exact_sum.float(), case.arguments[1].float(), 1e-6).bfloat16()
    found = rms_norm_check(ops.rms_norm, case, [unrounded, summed], exact)
    assert [finding.passed for finding in found] == [False, True]
