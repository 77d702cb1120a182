"""A product into the residual stream through a gate: residual += gate * (x weight^T + bias).

Tiling, bytes, FLOPs, bound: those of linear, whose kernel it is.
"""

from torch import Tensor

from .linear import launch


def linear_gated_add(x: Tensor, weight: Tensor, residual: Tensor, gate: Tensor, bias: Tensor | None) -> None:
    """x [..., K], residual [..., N] with rows at one distance; weight [N, K]; gate, bias [N] contiguous."""
    launch(x, weight, bias, gate, residual)
