"""On a GPU too, products with folded neighbours have the bits of the ops one after the other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from blip3o_rt import ops
from blip3o_rt.ops import native
from blip3o_rt.validate.case import random
from blip3o_rt.validate.cases.row_linear_int8 import quantised

pytestmark = pytest.mark.skipif(native.cuda_unavailable() is not None, reason=str(native.cuda_unavailable()))


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 8, 9, 33])
@pytest.mark.parametrize(("outputs", "inputs"), [(4096, 2048), (2048, 6144), (70, 264), (70, 37)])
def test_bits_of_the_parts(int8: bool, rows: int, outputs: int, inputs: int) -> None:
    dtype, device = torch.bfloat16, "cuda"
    x, norm_weight = random(1, rows, inputs, dtype=dtype), random(3, inputs, dtype=dtype)
    weight, scale = quantised(2, outputs, inputs) if int8 else (random(2, outputs, inputs, dtype=dtype), None)
    x, norm_weight, weight = (tensor.to(device) for tensor in (x, norm_weight, weight))
    scale = None if scale is None else scale.to(device)
    residual = random(4, rows, outputs, dtype=dtype).to(device)

    def product(x: Tensor) -> Tensor:
        return ops.row_linear(x, weight) if scale is None else ops.row_linear_int8(x, weight, scale)

    normed = product(ops.rms_norm(x, norm_weight, 1e-6))
    assert torch.equal(ops.norm_row_linear(x, norm_weight, 1e-6, weight, scale=scale), normed)
    gated = ops.norm_row_linear(x, norm_weight, 1e-6, weight, scale=scale, gated=True)
    assert torch.equal(gated, ops.silu_mul(normed))
    expected = residual + product(x)
    assert torch.equal(ops.row_linear_add(x, weight, residual, scale=scale), expected)
