"""Attention of image tokens to the condition's keys, each of which may stand for several identical ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from blip3o_rt.ops import native, triton_backend
from blip3o_rt.ops.registry import FLOATS, op
from blip3o_rt.ops.rounding import arithmetic_dtype, deliver

TRITON_HEAD = 128  # channels of the widest head that a program holds


@op(tolerance={torch.float32: 1e-5, torch.bfloat16: 2e-2})
def cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_weight: Tensor | None,
    eps: float,
    *,
    log_multiplicity: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(d) + log_multiplicity) v per head, where q = rms_norm(query).

    query [N, H d], key and value [H, M, d] -> [N, H d] in the dtype of query. The norm is over all H d
    channels of a token, with query_weight [H d] and `eps`; without a weight there is none (keys come normed).
    log_multiplicity fp32 [M]: a key that stands for n identical ones adds log(n) to its logits.

    In bfloat16 the normed query and the weights may be rounded to it before they are multiplied, as those of
    the published code are; hence the tolerance of bfloat16.
    """
    wide = arithmetic_dtype(query)
    q = query.to(wide)
    if query_weight is not None:
        q = q * torch.rsqrt(q.square().mean(-1, keepdim=True) + eps) * query_weight.to(wide)
    q = q.unflatten(-1, (key.shape[0], -1)).transpose(0, 1)
    bias = None if log_multiplicity is None else log_multiplicity.to(wide).expand(1, 1, len(query), -1)
    attended = F.scaled_dot_product_attention(q[None], key.to(wide)[None], value.to(wide)[None], bias)[0]
    return deliver(attended.transpose(0, 1).flatten(1), query.dtype, out)


def _triton_supports(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_weight: Tensor | None,
    eps: float,
    *,
    log_multiplicity: Tensor | None = None,
    out: Tensor | None = None,
) -> str | None:
    heads, keys, head_dim = key.shape[-3:]
    triton_backend.check_shapes(
        "cross_attention",
        key=(key, key.shape[-3:]),
        query=(query, (len(query), heads * head_dim)),
        value=(value, key.shape),
        query_weight=(query_weight, (heads * head_dim,)),
        log_multiplicity=(log_multiplicity, (keys,)),
        out=(out, query.shape),
    )
    if head_dim > TRITON_HEAD:
        return f"takes heads of at most {TRITON_HEAD} channels"
    for tensor in (query, key, value, *([] if out is None else [out])):
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            return "takes query, key, value and out with contiguous channels"
        if tensor.dtype != query.dtype:
            return "takes query, key, value and out of one dtype"
    return triton_backend.takes_contiguous(query_weight=query_weight, log_multiplicity=log_multiplicity)


@cross_attention.implementation(
    "triton",
    device="cuda",
    dtypes=FLOATS,
    supports=_triton_supports,
    available=triton_backend.unavailable,
)
def _triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_weight: Tensor | None,
    eps: float,
    *,
    log_multiplicity: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device) if out is None else out
    triton_backend.kernel("cross_attention")(query, key, value, query_weight, eps, log_multiplicity, out)
    return out


def _one_dtype(
    query: Tensor, key: Tensor, value: Tensor, query_weight: Tensor | None, *_: Any, **__: Any
) -> str | None:
    """The support of an implementation for keys, values and weight in the dtype of the query."""
    same = all(other is None or other.dtype == query.dtype for other in (key, value, query_weight))
    return None if same else "takes query, key, value and query_weight of one dtype"


@cross_attention.implementation(
    "cpu", device="cpu", dtypes=FLOATS, supports=_one_dtype, available=native.cpu_unavailable
)
def _cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_weight: Tensor | None,
    eps: float,
    *,
    log_multiplicity: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    out = torch.empty(query.shape, dtype=query.dtype) if out is None else out
    native.cpu().cross_attention(
        query, key, value, query_weight, eps, log_multiplicity=log_multiplicity, out=out
    )
    return out
