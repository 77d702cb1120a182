"""Norms: RMSNorm of rows and of an image's channels, and LayerNorm that the timestep modulates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from blip3o_rt.errors import OpError
from blip3o_rt.ops.dtypes import FLOATS, cast_out, compute_dtype, rms_normed
from blip3o_rt.ops.elementwise import gated_add
from blip3o_rt.ops.registry import op, same_dtype
from blip3o_rt.ops.triton_backend import takes_contiguous, takes_rows

__all__ = ["add_layer_norm_modulate", "channel_rms_norm", "layer_norm_modulate", "rms_norm", "rms_norm_keep"]

CPU_ELEMENTS = 2**18  # at a time, so that the float32 intermediates stay in cache
OTHER_ELEMENTS = 2**25  # at a time, so that those of a full-resolution image stay small


@op("x [..., D], weight [D], bias [D], residual [..., D] -> [..., D]", tolerance=1e-6)
def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """y / sqrt(mean(y^2) + eps) * weight + bias over the last dimension, y = x or the updated residual.

    x [..., D], weight [D], bias [D] -> [..., D] in the dtype of x. With a residual [..., D], `residual += x`
    happens in place first (rounded to its dtype), and y is that sum. `out` receives the result; it may be x.
    """
    dtype = compute_dtype(x)
    y = x.to(dtype)
    if residual is not None:
        residual.copy_(residual.to(dtype) + y)
        y = residual.to(dtype)
    y = rms_normed(y, weight, eps)
    if bias is not None:
        y = y + bias.to(dtype)
    return cast_out(y, x.dtype, out)


rms_norm.native("cuda", dtypes=FLOATS, supports=same_dtype("x", "weight"))
rms_norm.native("cpu", dtypes=FLOATS, supports=same_dtype("x", "weight"))


@op("x [R, D], weight [D], slots [R], kept [N, D] -> [R, D]", tolerance=1e-6)
def rms_norm_keep(
    x: Tensor, weight: Tensor, eps: float, slots: Tensor, kept: Tensor, *, out: Tensor | None = None
) -> Tensor:
    """rms_norm(x, weight, eps) for x [R, D], weight [D] -> [R, D]; kept[slots] receives the rows too.

    slots int64 [R], each 0 to N - 1; kept [N, D] in the dtype of x. Of rows that share a slot any one is
    kept. `out` may be x.
    """
    normed = rms_norm.reference(x, weight, eps, out=out)
    kept.index_copy_(0, slots, normed)
    return normed


rms_norm_keep.native("cuda", dtypes=FLOATS, supports=same_dtype("x", "weight", "kept"))


@rms_norm_keep.composed(dtypes=FLOATS, supports=same_dtype("x", "weight", "kept"))
def _(call: Any) -> Tensor:
    """The norm, and a copy behind it."""
    normed = rms_norm(call.x, call.weight, call.eps, out=call.out)
    call.kept.index_copy_(0, call.slots, normed)
    return normed


@op("x [..., C], weight [C], bias [C], residual [..., C] -> [..., C]", tolerance=1e-6)
def channel_rms_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    relu: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight + bias + residual over the last dimension, then ReLU if asked.

    x [..., C] contiguous, weight and bias [C], residual [..., C] or None -> [..., C] in the dtype of x. `out`
    receives the result; it may be x or the residual. The channels are those of an image held channels last.
    """
    dtype = compute_dtype(x)
    weight, bias = weight.to(dtype), bias.to(dtype)
    out = torch.empty_like(x) if out is None else out
    elements = CPU_ELEMENTS if x.device.type == "cpu" else OTHER_ELEMENTS
    step = max(1, elements // x.shape[-1])
    rows, results = x.view(-1, x.shape[-1]).split(step), out.view(-1, x.shape[-1]).split(step)
    added = None if residual is None else residual.view(-1, x.shape[-1]).split(step)
    for index, (row, result) in enumerate(zip(rows, results, strict=True)):
        y = row.to(dtype)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True).add_(eps))
        y.mul_(weight).add_(bias)
        if added is not None:
            y.add_(added[index])
        if relu:
            y.relu_()
        result.copy_(y)
    return out


def _contiguous_rows(call: Any) -> str | None:
    return takes_rows(call, "x") or takes_contiguous(call, "x", "weight", "bias", "residual", "out")


channel_rms_norm.triton(dtypes=FLOATS, supports=_contiguous_rows)
channel_rms_norm.native("cpu", dtypes=FLOATS, supports=same_dtype("x", "weight", "bias", "residual"))


@op("x [..., D], shift [D], scale [D] -> [..., D]", tolerance=1e-5)  # subtracting the mean cancels digits
def layer_norm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, *, out: Tensor | None = None
) -> Tensor:
    """(x - mean(x)) / sqrt(var(x) + eps) * (1 + scale) + shift over the last dimension (var: biased).

    x [..., D], shift and scale [D] (fp32, or the dtype of x) -> [..., D] in the dtype of x, or in that of
    `out`, which may be fp32 for bf16 x. Known as AdaLN modulation.
    """
    dtype = compute_dtype(x)
    y = F.layer_norm(x.to(dtype), x.shape[-1:], 1 + scale.to(dtype), shift.to(dtype), eps)
    return cast_out(y, x.dtype, out)


def _rows_and_modulation(call: Any) -> str | None:
    return takes_rows(call, "x", "out") or takes_contiguous(call, "shift", "scale")


def _modulation_dtype(call: Any) -> str | None:
    same = call.shift.dtype == call.scale.dtype and call.shift.dtype in (torch.float32, call.x.dtype)
    return None if same else "takes shift and scale of one dtype, float32 or that of x"


layer_norm_modulate.triton(dtypes=FLOATS, supports=_rows_and_modulation)
layer_norm_modulate.native("cpu", dtypes=FLOATS, supports=_modulation_dtype)


@op(
    "residual [B, N, D], x [A, N, D], gate [D], constant [D], shift [D], scale [D] -> [B, N, D]",
    tolerance=1e-5,
)
def add_layer_norm_modulate(
    residual: Tensor,
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    *,
    gate: Tensor | None = None,
    constant: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """residual += gate * x in place, then layer_norm_modulate(residual, shift, scale, eps) -> [B, N, D].

    residual [B, N, D], x [A, N, D], the last A of B; where A is B - 1, `constant` [D] is added to the first
    one, ungated. Vectors [D] are fp32 or of the dtype of x. The sum is rounded to the dtype of the residual
    before it is normed, so that the bits are those of the ops one by one. `out` is as in layer_norm_modulate;
    it may be x where A is B. Raises OpError for another A.
    """
    if len(residual) != len(x) + (constant is not None):
        raise OpError(
            f"add_layer_norm_modulate: x has {len(x)} images and residual {len(residual)}: accepted are as "
            "many, or one fewer with a constant"
        )
    dtype = compute_dtype(residual)
    added = x.to(dtype) if gate is None else x.to(dtype) * gate.to(dtype)
    own = residual[-len(x) :] if len(x) else residual[:0]
    own.copy_(own.to(dtype) + added)
    if constant is not None:
        residual[0].copy_(residual[0].to(dtype) + constant.to(dtype))
    return layer_norm_modulate.reference(residual, shift, scale, eps, out=out)


def _images_and_vectors(call: Any) -> str | None:
    if len(call.residual) != len(call.x) + (call.constant is not None):
        return "takes an x for every image of the residual, or for all but the first and a constant"
    vectors = [v for v in (call.gate, call.constant, call.shift, call.scale) if v is not None]
    if call.x.dtype != call.residual.dtype or any(
        v.dtype not in (torch.float32, call.x.dtype) for v in vectors
    ):
        return "takes residual and x of one dtype, and vectors in it or in float32"
    return takes_rows(call, "residual", "x", "out") or takes_contiguous(
        call, "gate", "constant", "shift", "scale"
    )


add_layer_norm_modulate.triton(dtypes=FLOATS, supports=_images_and_vectors)


@add_layer_norm_modulate.composed(dtypes=FLOATS, supports=_images_and_vectors)
def _(call: Any) -> Tensor:
    """The ops one after the other."""
    own = call.residual[len(call.residual) - len(call.x) :]
    if call.gate is None:
        own.add_(call.x)
    else:
        gated_add(own, call.x, call.gate)
    if call.constant is not None:
        call.residual[0].add_(call.constant)
    return layer_norm_modulate(call.residual, call.shift, call.scale, call.eps, out=call.out)
