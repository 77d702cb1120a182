"""A linear layer as the model keeps it, in 16, 32 or 8 bits, and its products with few rows and with many."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from blip3o_rt import ops
from blip3o_rt.weights import SCALE

FEW_ROWS = 8  # with more, a product is worth widening an 8-bit weight to the dtype of the rows
BLOCK_ROWS = 2048  # of an int8 weight whose product exists as int32 at a time


@dataclass(frozen=True)
class Linear:
    """A weight [N, K] and a bias [N] or None.

    The weight has the dtype of x, or is int8 or e4m3 with a float32 `scale` [N] of its rows.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: Tensor | None = None

    @classmethod
    def of(cls, weights: Mapping[str, Tensor], name: str, *, bias: bool = True) -> Linear:
        """The layer of that name among runtime tensors, with its bias if it has one."""
        weight = name + ".weight"
        return cls(
            weights[weight], weights.get(name + ".bias") if bias else None, weights.get(weight + SCALE)
        )

    def rows(self, first: int, last: int) -> Linear:
        """Rows first .. last, in the same memory."""
        parts = (None if t is None else t[first:last] for t in (self.bias, self.scale))
        return Linear(self.weight[first:last], *parts)

    # The decoder: W8A16 where the weight has 8 bits, no bias

    def row_linear(self, x: Tensor, *, out: Tensor) -> Tensor:
        """x [M, K] -> out [M, N] for the few rows of a decoding step, each as if it were alone."""
        if self.scale is None:
            return ops.row_linear(x, self.weight, out=out)
        return ops.row_linear_w8(x, self.weight, self.scale, out=out)

    def norm_row_linear(
        self, x: Tensor, norm: Tensor, eps: float, *, scratch: ops.Scratch, out: Tensor, gated: bool = False
    ) -> Tensor:
        """RMSNorm of x [M, K] with weight `norm` [K] and its product -> out [M, N], or [M, N / 2] gated."""
        return ops.norm_row_linear(
            x, norm, eps, self.weight, scale=self.scale, gated=gated, scratch=scratch, out=out
        )

    def row_linear_add(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual [M, N] += the product with x [M, K], in place."""
        return ops.row_linear_add(x, self.weight, residual, scale=self.scale)

    def prompt_linear(self, x: Tensor) -> Tensor:
        """x [M, K] -> [M, N] for the many rows of a prompt."""
        if self.scale is None:
            return ops.linear(x, self.weight)
        product = ops.row_linear_w8 if len(x) <= FEW_ROWS else ops.linear_w8a16
        return product(x, self.weight, self.scale)

    # The transformer: W8A8 where the weight has 8 bits, each row of x rounded to multiples of its own scale

    def __call__(self, x: Tensor, *, out: Tensor | None = None) -> Tensor:
        """x [..., K] -> [..., N], contiguous. `out` must not overlap x."""
        if out is None:
            out = x.new_empty(*x.shape[:-1], len(self.weight))
        if self.scale is None:
            return ops.linear(x, self.weight, self.bias, out=out)
        rows, result = x.reshape(-1, x.shape[-1]), out.view(-1, len(self.weight))
        row_scale = torch.empty(len(rows), dtype=torch.float32, device=x.device)
        values = ops.quantize_rows(rows, row_scale, dtype=self.weight.dtype)
        if self.weight.dtype == torch.int8:
            self._integer_product(values, row_scale, self.scale, result)
        else:
            ops.linear_fp8(values, row_scale, self.weight, self.scale, bias=self.bias, out=result)
        return out

    def gated_add(self, x: Tensor, residual: Tensor, gate: Tensor, *, product: Tensor) -> Tensor:
        """residual [..., N] += gate [N] * the product with x [..., K], in place; `product` may be written."""
        if self.scale is None:
            return ops.linear_gated_add(x, self.weight, residual, gate, self.bias, product=product)
        return ops.gated_add(residual, self(x, out=product), gate)

    def batch_invariant(self, x: Tensor, out: Tensor) -> bool:
        """Whether a row of x has the same product, bit for bit, whatever other rows x has."""
        if self.scale is None:
            return ops.linear.chosen(x, self.weight, self.bias, out=out).batch_invariant
        return self.weight.dtype == torch.int8  # sums of integers are exact, and scaled element by element

    def _integer_product(self, values: Tensor, row_scale: Tensor, scale: Tensor, out: Tensor) -> None:
        """The product of integers; the weight a block of rows at a time."""
        for first in range(0, len(self.weight), BLOCK_ROWS):
            block = slice(first, first + BLOCK_ROWS)
            product = ops.integer_product(values, self.weight[block])
            bias = None if self.bias is None else self.bias[block]
            ops.scale_product(product, scale[block], row_scale=row_scale, bias=bias, out=out[:, block])
