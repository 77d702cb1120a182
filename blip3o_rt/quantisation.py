"""Weights in 8 bits: every row of a matrix as int8 values and one scale, symmetric about zero."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 127  # -128 is not used, so that the range is symmetric
ROWS_AT_ONCE = 4096  # that exist in float32


def row_scales(matrix: Tensor) -> Tensor:
    """float32 [N] of a matrix [N, K]: what its largest element is of 127; 0 for a row of zeros."""
    largest = torch.stack([matrix.amax(dim=1), -matrix.amin(dim=1)]).amax(dim=0)
    return largest.float() / LARGEST


def row_values(matrix: Tensor) -> Tensor:
    """int8 [N, K]: the nearest multiples of each row's scale."""
    blocks = [_values(block) for block in matrix.split(ROWS_AT_ONCE)]
    return torch.cat(blocks) if len(blocks) > 1 else blocks[0]


def _values(matrix: Tensor) -> Tensor:
    scales = row_scales(matrix)
    inverse = torch.where(scales > 0, 1 / scales, 0)
    return (matrix.float() * inverse[:, None]).round_().clamp_(-LARGEST, LARGEST).to(torch.int8)
