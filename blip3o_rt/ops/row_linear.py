"""Product of a few rows with a weight matrix, the work of a decoding step."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from blip3o_rt.ops.registry import BF16, op
from blip3o_rt.ops.rounding import arithmetic_dtype, deliver


@op(tolerance={torch.float32: 4e-6, torch.bfloat16: BF16})
def row_linear(x: Tensor, weight: Tensor, *, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """x weight^T + bias for x [M, K], weight [N, K], bias [N] -> [M, N] in the dtype of x, or of `out`.

    `out` may be float32 for bfloat16 operands (logits). Meant for M up to about 64. The implementations "cpu"
    and later ones for the GPU give each row the same bits whatever the other rows are and however many; the
    reference leaves that to torch.
    """
    if x.dtype == torch.bfloat16 and (out is None or out.dtype == x.dtype):
        result = F.linear(x, weight, bias)  # accumulates in float32, rounds once; spares a copy of the weight
    else:
        wide = arithmetic_dtype(x)
        result = F.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    return deliver(result, x.dtype, out)
