"""Self-attention with a ReLU kernel: linear in the number of tokens, since the keys meet the values first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from blip3o_rt.ops import native, triton_backend
from blip3o_rt.ops.registry import FLOATS, op
from blip3o_rt.ops.rounding import arithmetic_dtype, deliver

EPSILON = 1e-15  # added to the denominator; 0 / EPSILON is the result of a query that meets no key
TRITON_HEAD = 64  # channels of the widest head whose state a program holds


@op(tolerance={torch.float32: 1e-5, torch.bfloat16: 1e-5})  # sums over all tokens
def relu_linear_attention(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    num_heads: int,
    eps: float,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """q_n . sum_m(k_m v_m) / (q_n . sum_m(k_m) + 1e-15) per head, where q, k = relu(rms_norm(.)).

    qkv [B, N, 3 D] = (q | k | v), D = num_heads * head_dim -> [B, N, D] in the dtype of qkv. The norm is over
    all D channels of a token, with weights [D] and `eps`; without weights there is no norm. The sums over the
    N tokens are kept in fp32. (SANA, arXiv 2410.10629.)
    """
    wide = arithmetic_dtype(qkv)
    q, k, v = qkv.chunk(3, dim=-1)
    q, k = _positive(q, q_weight, eps, wide), _positive(k, k_weight, eps, wide)
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v.to(wide)))  # [B, H, N, d]
    state = k.transpose(2, 3) @ v  # [B, H, d, d]
    total = k.sum(2).unsqueeze(-1)  # [B, H, d, 1]
    attended = (q @ state).div_((q @ total).add_(EPSILON))
    return deliver(attended.transpose(1, 2).flatten(2), qkv.dtype, out)


def _positive(x: Tensor, weight: Tensor | None, eps: float, wide: torch.dtype) -> Tensor:
    x = x.to(wide)
    if weight is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(wide)
    return x.relu()


def _triton_supports(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    num_heads: int,
    eps: float,
    *,
    out: Tensor | None = None,
) -> str | None:
    batch, tokens, channels = qkv.shape
    width = channels // (3 * num_heads) * num_heads
    triton_backend.check_shapes(
        "relu_linear_attention",
        qkv=(qkv, (batch, tokens, 3 * width)),
        q_weight=(q_weight, (width,)),
        k_weight=(k_weight, (width,)),
        out=(out, (batch, tokens, width)),
    )
    if (q_weight is None) != (k_weight is None):
        return "takes weights of both norms, or of none"
    if width // num_heads > TRITON_HEAD:
        return f"takes heads of at most {TRITON_HEAD} channels"
    if qkv.stride(-1) != 1 or (out is not None and out.stride(-1) != 1):
        return "takes qkv and out with contiguous channels"
    return triton_backend.takes_contiguous(q_weight=q_weight, k_weight=k_weight)


@relu_linear_attention.implementation(
    "triton",
    device="cuda",
    dtypes=FLOATS,
    supports=_triton_supports,
    available=triton_backend.unavailable,
)
def _triton(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    num_heads: int,
    eps: float,
    *,
    out: Tensor | None = None,
) -> Tensor:
    if out is None:
        batch, tokens, width = qkv.shape
        out = torch.empty((batch, tokens, width // 3), dtype=qkv.dtype, device=qkv.device)
    triton_backend.kernel("relu_linear_attention")(qkv, q_weight, k_weight, num_heads, eps, out)
    return out


def _one_dtype(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, *_: Any, **__: Any
) -> str | None:
    """The support of an implementation for weights in the dtype of qkv."""
    same = all(weight is None or weight.dtype == qkv.dtype for weight in (q_weight, k_weight))
    return None if same else "takes qkv and weights of one dtype"


@relu_linear_attention.implementation(
    "cpu", device="cpu", dtypes=FLOATS, supports=_one_dtype, available=native.cpu_unavailable
)
def _cpu(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    num_heads: int,
    eps: float,
    *,
    out: Tensor | None = None,
) -> Tensor:
    out = torch.empty((*qkv.shape[:-1], qkv.shape[-1] // 3), dtype=qkv.dtype) if out is None else out
    native.cpu().relu_linear_attention(qkv, q_weight, k_weight, num_heads, eps, out=out)
    return out
