"""On a GPU too, products with folded neighbors have the bits of the ops one after the other, and a row those
it has alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from blip3o_rt import ops
from blip3o_rt.measure.cases.quantized import quantized
from blip3o_rt.measure.validate.case import random
from blip3o_rt.ops.dtypes import E4M3
from blip3o_rt.ops.linear import FUSED_ROWS

pytestmark = pytest.mark.gpu("_cuda")
SIZES = [(4096, 2048), (2048, 6144), (70, 264), (70, 37)]  # outputs and inputs


class Products:
    """Rows, a weight and what is folded into their product: bfloat16, the weight in 8 bits if `values` is."""

    def __init__(self, values: torch.dtype | None, rows: int, outputs: int, inputs: int) -> None:
        def normal(seed: int, *shape: int) -> Tensor:
            return random(seed, *shape, dtype=torch.bfloat16).cuda()

        self.x, self.norm_weight = normal(1, rows, inputs), normal(3, inputs)
        self.residual = normal(4, rows, outputs)
        self.weight, self.scale = normal(2, outputs, inputs), None
        if values is not None:
            self.weight, self.scale = (tensor.cuda() for tensor in quantized(2, outputs, inputs, values))

    def product(self, x: Tensor) -> Tensor:
        if self.scale is None:
            return ops.row_linear(x, self.weight)
        return ops.row_linear_w8(x, self.weight, self.scale)

    def folded(self, rows: slice) -> list[Tensor]:
        """Normed, normed and gated, added: of some rows."""
        x, weight, scale = self.x[rows], self.weight, self.scale
        normed, gated = (
            ops.norm_row_linear(x, self.norm_weight, 1e-6, weight, scale=scale, gated=gated)
            for gated in (False, True)
        )
        return [normed, gated, ops.row_linear_add(x, weight, self.residual[rows].clone(), scale=scale)]


@pytest.mark.parametrize("values", [None, torch.int8, E4M3])
@pytest.mark.parametrize("rows", [1, 2, 8, 9, 33])
@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
def test_bits_of_the_parts(values: torch.dtype | None, rows: int, outputs: int, inputs: int) -> None:
    case = Products(values, rows, outputs, inputs)
    normed = case.product(ops.rms_norm(case.x, case.norm_weight, 1e-6))
    expected = [normed, ops.silu_mul(normed), case.residual + case.product(case.x)]
    assert all(torch.equal(*pair) for pair in zip(case.folded(slice(None)), expected, strict=True))


@pytest.mark.parametrize("values", [None, torch.int8, E4M3])
@pytest.mark.parametrize("rows", [9, 16, 17, 33])
@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
def test_few_rows_have_the_bits_they_have_among_more(
    values: torch.dtype | None, rows: int, outputs: int, inputs: int
) -> None:
    """More rows than a folded kernel takes go through the ops one after the other."""
    case = Products(values, rows, outputs, inputs)
    together = case.folded(slice(None))
    for few in (slice(FUSED_ROWS), slice(rows - 1, rows)):
        assert all(
            torch.equal(alone, all_[few]) for alone, all_ in zip(case.folded(few), together, strict=True)
        )
