"""A weight matrix of the transformer as it is kept, and its product with the rows of all tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from blip3o_rt import ops
from blip3o_rt.weights import SCALE

BLOCK_ROWS = 2048  # of an int8 weight whose product exists as int32 at a time


@dataclass(frozen=True)
class Matrix:
    """[N, K], a bias [N]: `weight` in the dtype of x, or int8 or e4m3 with a float32 `scale` [N] for rows."""

    weight: Tensor
    bias: Tensor | None = None
    scale: Tensor | None = None

    @classmethod
    def of(cls, weights: Mapping[str, Tensor], name: str, *, bias: bool = True) -> Matrix:
        """The layer of that name among runtime tensors, with its bias if it has one."""
        weight = name + ".weight"
        return cls(
            weights[weight], weights.get(name + ".bias") if bias else None, weights.get(weight + SCALE)
        )

    def __call__(self, x: Tensor, *, out: Tensor | None = None) -> Tensor:
        """x [..., K] -> [..., N], contiguous. `out` must not overlap x."""
        if out is None:
            out = x.new_empty(*x.shape[:-1], len(self.weight))
        if self.scale is None:
            return ops.linear(x, self.weight, self.bias, out=out)
        product = self._int8 if self.weight.dtype == torch.int8 else self._fp8
        product(x.reshape(-1, x.shape[-1]), self.scale, out.view(-1, len(self.weight)))
        return out

    def _int8(self, x: Tensor, scale: Tensor, out: Tensor) -> None:
        """The product of integers, each row of x [M, K] rounded to multiples of its own scale."""
        row_scale = torch.empty(len(x), dtype=torch.float32, device=x.device)
        values = ops.quantize_rows(x, row_scale)
        for first in range(0, len(self.weight), BLOCK_ROWS):
            block = slice(first, first + BLOCK_ROWS)
            product = ops.integer_product(values, self.weight[block])
            bias = None if self.bias is None else self.bias[block]
            ops.scale_product(product, scale[block], row_scale=row_scale, bias=bias, out=out[:, block])

    def _fp8(self, x: Tensor, scale: Tensor, out: Tensor) -> None:
        """The product of e4m3 numbers, each row of x [M, K] rounded to multiples of its own scale."""
        row_scale = torch.empty(len(x), dtype=torch.float32, device=x.device)
        values = ops.quantize_rows(x, row_scale, dtype=self.weight.dtype)
        ops.linear_fp8(values, row_scale, self.weight, scale, bias=self.bias, out=out)
