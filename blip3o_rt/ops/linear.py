"""Products with weight matrices: of many rows, and of few, with norm, gate and residual fused into them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from blip3o_rt.errors import OpError
from blip3o_rt.ops import bf16_products
from blip3o_rt.ops.dtypes import E4M3, FLOATS, WEIGHTS, cast_out, compute_dtype
from blip3o_rt.ops.elementwise import gated_add, silu_mul
from blip3o_rt.ops.norm import rms_norm
from blip3o_rt.ops.quantized import check_memory, no_e4m3, products_of_rows, row_linear_w8
from blip3o_rt.ops.registry import op, same_dtype
from blip3o_rt.ops.scratch import Scratch
from blip3o_rt.ops.triton_backend import takes_contiguous, takes_rows

__all__ = ["linear", "linear_gated_add", "norm_row_linear", "row_linear", "row_linear_add"]

CONVERTED_ROWS = 4096  # rows of a bfloat16 weight that exist in float32 at a time
FUSED_ROWS = 8  # of x that one CUDA kernel norms and multiplies: those of one product of the tensor cores


@op("x [..., K], weight [N, K], bias [N] -> [..., N]", tolerance={torch.float32: 4e-6, torch.bfloat16: 1e-5})
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """x weight^T + bias for x [..., K], weight [N, K], bias [N], all of one dtype -> [..., N] in it.

    The weight may be bfloat16 beside float32, which it is widened to. Summed in float32, rounded once. `out`
    must not overlap x, and be contiguous if it is no matrix. Raises OpError for another `out`.
    """
    weight = weight.to(x.dtype)
    if out is None:
        return F.linear(x, weight, bias)
    if out.ndim != 2 and not out.is_contiguous():
        raise OpError("linear: out must be contiguous, or a matrix; give it memory of its own")
    rows, result = x.reshape(-1, x.shape[-1]), out.view(-1, len(weight))
    if bias is None:
        torch.mm(rows, weight.t(), out=result)
    else:
        torch.addmm(bias, rows, weight.t(), out=result)
    return out


def _rows_and_bfloat16_weight(call: Any) -> str | None:
    tensors = [t for t in (call.x, call.weight, call.out) if t is not None]
    if not all(t.is_contiguous() or (t.ndim == 2 and t.stride(1) == 1) for t in tensors):
        return "takes contiguous tensors, or matrices with contiguous rows"
    if call.weight.dtype != torch.bfloat16:
        return "takes a bfloat16 weight"
    if call.x.dtype == torch.bfloat16 and call.x.shape[-1] % 2:
        return "takes an even K"
    return _one_dtype(call) or takes_contiguous(call, "bias")


_one_dtype = same_dtype("x", "bias", "out")


def _matrices(call: Any) -> str | None:
    if not all(t is None or t.ndim == 2 or t.is_contiguous() for t in (call.x, call.out)):
        return "takes contiguous tensors, or matrices"
    if not all(t is None or t.stride(-1) == 1 for t in (call.weight, call.out)):
        return "takes weight and out with contiguous rows"
    if call.weight.dtype not in (call.x.dtype, torch.bfloat16):
        return "takes a weight of the dtype of x, or of bfloat16"
    return _one_dtype(call) or takes_contiguous(call, "bias")


linear.triton(dtypes=FLOATS, supports=_matrices, batch_invariant=True, on_request=True)

linear.native(
    "cpu",
    dtypes=FLOATS,
    supports=_rows_and_bfloat16_weight,
    weights={torch.float32: (torch.bfloat16,), torch.bfloat16: (torch.bfloat16,)},
    needs={torch.bfloat16: bf16_products.slower},
    batch_invariant=True,
)


@op(
    "x [..., K], weight [N, K], residual [..., N], gate [N], bias [N], product [..., N] -> residual",
    tolerance={torch.float32: 4e-6, torch.bfloat16: 2e-2},
)
def linear_gated_add(
    x: Tensor,
    weight: Tensor,
    residual: Tensor,
    gate: Tensor,
    bias: Tensor | None = None,
    *,
    product: Tensor | None = None,
) -> Tensor:
    """residual += gate * (x weight^T + bias) in place for x [..., K], residual [..., N]; returns residual.

    weight [N, K] and bias [N] are as in linear, gate [N] as in gated_add. The product is rounded to the dtype
    of x before it is scaled, so that the bits are those of the two; hence the tolerance of bfloat16. The
    residual must not overlap x. product: memory of the product's shape that a call may use.
    """
    return gated_add.reference(residual, linear.reference(x, weight, bias), gate)


_gated_dtype = same_dtype("x", "residual", "bias")


def _matrices_and_residual(call: Any) -> str | None:
    if call.weight.stride(-1) != 1 or call.weight.dtype not in (call.x.dtype, torch.bfloat16):
        return "takes a weight with contiguous rows, of the dtype of x or of bfloat16"
    rows = takes_rows(call, "x", "residual")
    return _gated_dtype(call) or rows or takes_contiguous(call, "gate", "bias")


linear_gated_add.triton(dtypes=(torch.bfloat16,), supports=_matrices_and_residual)


@linear_gated_add.composed(dtypes=FLOATS)
def _(call: Any) -> Tensor:
    """The two ops, one after the other."""
    product = linear(call.x, call.weight, call.bias, out=call.product)
    return gated_add(call.residual, product, call.gate)


@op("x [M, K], weight [N, K], bias [N] -> [M, N]", tolerance=4e-6)
def row_linear(x: Tensor, weight: Tensor, *, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """x weight^T + bias for x [M, K], weight [N, K], bias [N] -> [M, N] in the dtype of x, or of `out`.

    A skinny GEMM, meant for the rows of a batch and not for those of a prompt. The weight may be bfloat16
    beside float32, which it is widened to. `out` may be float32 for bfloat16 operands (logits). It must not
    overlap x; OpError if it begins where x does. Batch-invariant: a row's result is bit-identical whatever
    else is in the batch (contiguous x); the reference takes rows one at a time for that.
    """
    check_memory("row_linear", x, out=out)
    dtype = compute_dtype(x)
    rounds_once = x.dtype == torch.bfloat16 and (out is None or out.dtype == x.dtype)
    if weight.dtype == x.dtype and (x.dtype == dtype or rounds_once):  # torch sums bfloat16 in float32
        rows = x.split(1) if len(x) > 1 else (x,)
        return cast_out(torch.cat([F.linear(row, weight, bias) for row in rows]), x.dtype, out)
    return products_of_rows(x, (block.to(dtype) for block in weight.split(CONVERTED_ROWS)), bias, out)


row_linear.native("cuda", dtypes=FLOATS, supports=same_dtype("x", "weight"))


def _widened_weight(call: Any) -> str | None:
    if call.weight.dtype in WEIGHTS[call.x.dtype]:
        return None
    return "takes x and weight of one dtype, or a bfloat16 weight beside float32"


row_linear.native("cpu", dtypes=FLOATS, supports=_widened_weight, weights=WEIGHTS)


def _known_weight(call: Any) -> str | None:
    """None where a weight is in the dtype of x, or in 8 bits with a scale per row; else what is taken."""
    if call.weight.dtype in ((call.x.dtype,) if call.scale is None else (torch.int8, E4M3)):
        return None
    return "takes x and weight of one dtype, or an int8 or e4m3 weight with a scale"


def _known_to_ops(call: Any) -> str | None:
    """The same with a weight that may be bfloat16 beside float32."""
    return _widened_weight(call) if call.scale is None else _known_weight(call)


def _known_to_cpu(call: Any) -> str | None:
    return _known_to_ops(call) or no_e4m3(call)


def _product(x: Tensor, weight: Tensor, scale: Tensor | None, out: Tensor) -> Tensor:
    """x weight^T -> out by the op for the weight."""
    if scale is None:
        return row_linear(x, weight, out=out)
    return row_linear_w8(x, weight, scale, out=out)


def _reference_product(x: Tensor, weight: Tensor, scale: Tensor | None, out: Tensor | None = None) -> Tensor:
    """x weight^T by the definition of that op."""
    if scale is None:
        return row_linear.reference(x, weight, out=out)
    return row_linear_w8.reference(x, weight, scale, out=out)


@op(
    "x [M, K], weight [N, K], scale [N], residual [M, N] -> residual",
    tolerance={torch.float32: 4e-6, torch.bfloat16: 2e-2},
)
def row_linear_add(x: Tensor, weight: Tensor, residual: Tensor, *, scale: Tensor | None = None) -> Tensor:
    """residual += x weight^T in place for x [M, K], weight [N, K], residual [M, N]; returns residual.

    With `scale` float32 [N] the weight is int8 or e4m3, as in row_linear_w8. The product is rounded to the
    dtype of x before it is added, so that the bits are those of row_linear and an addition; hence the
    tolerance of bfloat16. The residual must not overlap x; OpError if it begins where x does.
    Batch-invariant: a row's result is bit-identical whatever else is in the batch (contiguous x).
    """
    check_memory("row_linear_add", x, residual=residual)
    dtype = compute_dtype(x)
    return residual.copy_(residual.to(dtype) + _reference_product(x, weight, scale).to(dtype))


row_linear_add.native("cuda", dtypes=FLOATS, supports=_known_weight)
row_linear_add.native("cpu", dtypes=FLOATS, supports=_known_to_cpu, weights=WEIGHTS)


@op(
    "x [M, K], norm_weight [K], weight [N, K], scale [N] -> [M, N / (1 + gated)]",
    tolerance={torch.float32: 1e-5, torch.bfloat16: 2e-2},
)
def norm_row_linear(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    *,
    scale: Tensor | None = None,
    gated: bool = False,
    scratch: Scratch | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """rms_norm(x, norm_weight, eps) weight^T for x [M, K], norm_weight [K], weight [N, K] -> [M, N].

    With `scale` float32 [N] the weight is int8 or e4m3, as in row_linear_w8. `gated`: the rows of the
    weight are N / 2 gates and as many ups, and the result is silu(gate) * up [M, N / 2]. Normed rows, gates
    and ups are rounded to the dtype of x, so that the bits are those of rms_norm, row_linear and silu_mul one
    after the other; hence the tolerance of bfloat16. `out` must not overlap x; OpError if it begins where x
    does. scratch: memory that a call may use (else it makes its own). Batch-invariant: a row's result is
    bit-identical whatever else is in the batch (contiguous x).
    """
    check_memory("norm_row_linear", x, out=out)
    normed = rms_norm.reference(x, norm_weight, eps)
    if not gated:
        return _reference_product(normed, weight, scale, out)
    return silu_mul.reference(_reference_product(normed, weight, scale), out=out)


def _few_rows(call: Any) -> str | None:
    """Every block norms the rows anew, so more are better normed once."""
    if len(call.x) > FUSED_ROWS:
        return f"takes up to {FUSED_ROWS} rows, got {len(call.x)}"
    return _known_weight(call)


norm_row_linear.native("cuda", dtypes=(torch.bfloat16,), supports=_few_rows)
norm_row_linear.native("cpu", dtypes=FLOATS, supports=_known_to_cpu, weights=WEIGHTS)


@norm_row_linear.composed(dtypes=FLOATS, supports=_known_to_ops)
def _(call: Any) -> Tensor:
    """The ops one after the other, each on the best implementation it has."""
    x, weight, out = call.x, call.weight, call.out
    (rows, inputs), outputs = x.shape, len(weight)
    if out is None:
        out = x.new_empty(rows, outputs // 2 if call.gated else outputs)
    scratch = Scratch() if call.scratch is None else call.scratch
    sizes = [rows * outputs if call.gated else 0, rows * inputs]
    gate_up, normed = scratch.memory(sum(sizes), x.dtype, x.device)[: sum(sizes)].split(sizes)
    normed = rms_norm(x, call.norm_weight, call.eps, out=normed.view(rows, inputs))
    if not call.gated:
        return _product(normed, weight, call.scale, out)
    return silu_mul(_product(normed, weight, call.scale, gate_up.view(rows, outputs)), out=out)
