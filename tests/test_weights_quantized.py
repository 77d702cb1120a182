"""Rows in 8 bits: never further off than half a step, whatever is in them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blip3o_rt import weights
from blip3o_rt.measure.validate.case import random
from blip3o_rt.weights import row_scales, row_values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(data=st.data(), rows=st.integers(1, 9), columns=st.integers(1, 40))
@settings(deadline=None, derandomize=True, max_examples=30)
def test_error_is_half_a_step(dtype: torch.dtype, data: st.DataObject, rows: int, columns: int) -> None:
    sizes = data.draw(st.lists(st.sampled_from([0.0, 1e-6, 1.0, 1e4]), min_size=rows, max_size=rows))
    matrix = (random(1, rows, columns) * torch.tensor(sizes)[:, None]).to(dtype)
    values, scales = row_values(matrix), row_scales(matrix)
    assert values.dtype == torch.int8
    assert scales.dtype == torch.float32
    assert int(values.abs().max()) <= 127
    error = (values.double() * scales.double()[:, None] - matrix.double()).abs()
    assert torch.all(
        error <= scales.double()[:, None] * (0.5 + 1e-4)
    )  # the inverse of a scale is rounded too
    full = scales > 0
    assert torch.equal(values[full].abs().amax(dim=1), torch.full((int(full.sum()),), 127, dtype=torch.int8))


def test_blocks_of_rows_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = random(1, 50, 8)
    whole = row_values(matrix)
    monkeypatch.setattr(weights, "ROWS_AT_ONCE", 7)
    assert torch.equal(row_values(matrix), whole)
