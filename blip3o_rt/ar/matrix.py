"""A weight matrix of the decoder as it is kept, and its products with few rows and with many."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from blip3o_rt import ops
from blip3o_rt.weights import SCALE

FEW_ROWS = 8  # with more, a product is worth widening an 8-bit weight to the dtype of the rows


@dataclass(frozen=True)
class Matrix:
    """[N, K]: `weight` in the dtype of x, or int8 or e4m3 with a `scale` float32 [N] for its rows."""

    weight: Tensor
    scale: Tensor | None = None

    @classmethod
    def of(cls, weights: Mapping[str, Tensor], name: str) -> Matrix:
        """The matrix of that name among runtime tensors."""
        return cls(weights[name], weights.get(name + SCALE))

    def rows(self, first: int, last: int) -> Matrix:
        """Rows first .. last, in the same memory."""
        return Matrix(self.weight[first:last], None if self.scale is None else self.scale[first:last])

    def row_linear(self, x: Tensor, *, out: Tensor) -> Tensor:
        """x [M, K] -> out [M, N] for the few rows of a decoding step, each as if it were alone."""
        if self.scale is None:
            return ops.row_linear(x, self.weight, out=out)
        return ops.row_linear_w8(x, self.weight, self.scale, out=out)

    def norm_row_linear(
        self,
        x: Tensor,
        norm_weight: Tensor,
        eps: float,
        *,
        gated: bool = False,
        scratch: ops.Scratch,
        out: Tensor,
    ) -> Tensor:
        """RMSNorm of x [M, K] and its product -> out [M, N], or [M, N / 2] of gates and ups."""
        return ops.norm_row_linear(
            x, norm_weight, eps, self.weight, scale=self.scale, gated=gated, scratch=scratch, out=out
        )

    def row_linear_add(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual [M, N] += the product with x [M, K], in place."""
        return ops.row_linear_add(x, self.weight, residual, scale=self.scale)

    def linear(self, x: Tensor) -> Tensor:
        """x [M, K] -> [M, N] for the many rows of a prompt."""
        if self.scale is None:
            return ops.linear(x, self.weight)
        product = ops.row_linear_w8 if len(x) <= FEW_ROWS else ops.linear_w8a16
        return product(x, self.weight, self.scale)
