"""A product of quantized matrices times the scales of its rows and columns, which is what it stands for."""

from __future__ import annotations

import torch
from torch import Tensor

from blip3o_rt.ops import native
from blip3o_rt.ops.registry import op
from blip3o_rt.ops.rounding import arithmetic_dtype


@op(tolerance={torch.float32: 1e-6, torch.bfloat16: 1e-6})
def scale_product(
    product: Tensor,
    scale: Tensor,
    *,
    out: Tensor,
    row_scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """out = product * row_scale * scale + bias for product [M, N]; rounded once, returns out.

    product int32, of int8 matrices, or in the dtype of out; scale float32 [N], row_scale float32 [M], bias
    [N] in the dtype of out. out [M, N] float32 or bfloat16; it may be product itself.
    """
    wide = arithmetic_dtype(out)
    result = product.to(wide) * scale.to(wide)
    if row_scale is not None:
        result = result * row_scale.to(wide)[:, None]
    return out.copy_(result if bias is None else result + bias.to(wide))


@scale_product.implementation(
    "cpu",
    device="cpu",
    dtypes=(torch.int32, torch.float32, torch.bfloat16),
    available=native.cpu_unavailable,
)
def _cpu(
    product: Tensor,
    scale: Tensor,
    *,
    out: Tensor,
    row_scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    native.cpu().scale_product(product, scale, out=out, row_scale=row_scale, bias=bias)
    return out
