"""Nearest codebook entry by cosine, the quantizer of TA-Tok."""

from __future__ import annotations

import torch
from torch import Tensor

from blip3o_rt.ops import native
from blip3o_rt.ops.registry import op

_ROWS = 64  # rows at a time, so that the scores of a large codebook stay small


@op(tolerance={torch.float32: 2e-6})
def nearest_code(features: Tensor, codebook: Tensor) -> Tensor:
    """Index of the codebook row with the largest dot product, the lowest on a tie.

    features float32 [N, D] (their length does not matter), codebook float32 [C, D] of unit rows -> int64 [N].
    The dot product of the row returned is within the tolerance (of the feature's length) of the largest.
    """
    return torch.cat([(rows @ codebook.T).argmax(dim=-1) for rows in features.split(_ROWS)])


@nearest_code.implementation("cpu", device="cpu", dtypes=(torch.float32,), available=native.cpu_unavailable)
def _cpu(features: Tensor, codebook: Tensor) -> Tensor:
    out = torch.empty(features.shape[0], dtype=torch.int64)
    native.cpu().nearest_code(features, codebook, out=out)
    return out
