"""Products with weights in 8 bits, and the quantization of activations: what the fast tier adds."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from blip3o_rt.errors import OpError
from blip3o_rt.machine import cuda_status, processor
from blip3o_rt.ops import bf16_products, triton_backend
from blip3o_rt.ops.dtypes import E4M3, FLOATS, LARGEST_INT8, cast_out, compute_dtype, largest_value
from blip3o_rt.ops.registry import op
from blip3o_rt.ops.triton_backend import takes_contiguous, takes_rows

__all__ = ["integer_product", "linear_fp8", "linear_w8a16", "quantize_rows", "row_linear_w8", "scale_product"]

CONVERTED_ROWS = 4096  # rows of the weight of row_linear_w8 that exist as wide numbers at a time
BLOCK_ROWS = 1024  # of linear_w8a16's weight that exist as floating-point numbers at a time, in the caches
VNNI = {"avx512_vnni", "avx_vnni", "amx_int8"}
CUBLAS_UNIT = 8  # of the sides of int8 matrices that torch multiplies on a GPU, where rows are more than 16
SCALED_MM_UNIT = 16  # torch's product of scaled matrices takes sides that are multiples of it

# The matrix units add the products of 8-bit numbers with some 14 bits, and the library's result is bfloat16.
TENSOR_CORE_SUMS, ROUNDED_TO_BFLOAT16 = 1e-3, 2.0**-7


def no_e4m3(call: Any) -> str | None:
    """Support of the CPU's kernels, none of which reads e4m3."""
    return "takes no e4m3 weight, which is for GPUs" if call.weight.dtype == E4M3 else None


@op("x [M, K], weight [N, K], scale [N], bias [N] -> [M, N]", tolerance=4e-6)
def row_linear_w8(
    x: Tensor, weight: Tensor, scale: Tensor, *, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """x (weight scale)^T + bias for x [M, K], weight int8 or e4m3 [N, K], scale float32 [N] -> [M, N].

    Row n of the matrix that is meant is scale[n] weight[n]: the weight is quantized, x is not (W8A16). bias
    [N]. `out` may be float32 for a bfloat16 x (logits). It must not overlap x; OpError if it begins where x
    does. Meant for one row or a few: with more, arithmetic is the limit and not memory, and less of it saves
    no time. Batch-invariant: a row's result is bit-identical whatever else is in the batch.
    """
    check_memory("row_linear_w8", x, out=out)
    dtype = compute_dtype(x)
    blocks = zip(weight.split(CONVERTED_ROWS), scale.split(CONVERTED_ROWS), strict=True)
    matrices = (values.to(dtype) * factors.to(dtype)[:, None] for values, factors in blocks)
    return products_of_rows(x, matrices, bias, out)


def check_memory(op_name: str, x: Tensor, **written: Tensor | None) -> None:
    """Raise OpError where a tensor that is written begins where x does."""
    for name, tensor in written.items():
        if tensor is not None and x.numel() and tensor.data_ptr() == x.data_ptr():
            raise OpError(f"{op_name}: {name} must not be the memory of x; give it memory of its own")


def products_of_rows(
    x: Tensor, matrices: Iterable[Tensor], bias: Tensor | None, out: Tensor | None
) -> Tensor:
    """x weight^T + bias, a row of x at a time; matrices: the weight's rows in blocks, wide."""
    dtype = compute_dtype(x)
    rows = [row.to(dtype) for row in (x.split(1) if len(x) > 1 else (x,))]

    def product(matrix: Tensor) -> Tensor:
        return torch.cat([F.linear(row, matrix) for row in rows])

    result = torch.cat(list(map(product, matrices)), dim=1)  # one block is alive at a time
    return cast_out(result if bias is None else result + bias.to(dtype), x.dtype, out)


row_linear_w8.native("cuda", dtypes=FLOATS)
row_linear_w8.native("cpu", dtypes=FLOATS, supports=no_e4m3)


@op("x [M, K], weight [N, K], scale [N] -> [M, N]", tolerance={torch.float32: 4e-6, torch.bfloat16: 2**-8})
def linear_w8a16(x: Tensor, weight: Tensor, scale: Tensor, *, out: Tensor | None = None) -> Tensor:
    """x (weight scale)^T for x [M, K], weight int8 or e4m3 [N, K], scale float32 [N] -> [M, N] as x.

    As row_linear_w8, for rows so many that arithmetic is the limit: the weight is converted once for all of
    them. A library's product rounds to bfloat16 before the scale is applied, so the tolerance there is that
    of one more rounding. `out` must not overlap x.
    """
    out = torch.empty(len(x), len(weight), dtype=x.dtype, device=x.device) if out is None else out
    for first in range(0, len(weight), BLOCK_ROWS):
        block = slice(first, first + BLOCK_ROWS)
        torch.mul(F.linear(x, weight[block].to(x.dtype)), scale[block], out=out[:, block])
    return out


def _int8_of_even_width(call: Any) -> str | None:
    return no_e4m3(call) if call.x.shape[-1] % 2 == 0 else "takes an even K"


linear_w8a16.native(
    "cpu", dtypes=FLOATS, supports=_int8_of_even_width, needs={torch.bfloat16: bf16_products.missing}
)


@op(
    "x [M, K], row_scale [M], weight [N, K], scale [N], bias [N] -> [M, N]",
    tolerance={torch.bfloat16: TENSOR_CORE_SUMS, torch.float32: ROUNDED_TO_BFLOAT16},
)
def linear_fp8(
    x: Tensor, row_scale: Tensor, weight: Tensor, scale: Tensor, *, out: Tensor, bias: Tensor | None = None
) -> Tensor:
    """out = (row_scale x) (scale weight)^T + bias, rounded once; returns out.

    x e4m3 [M, K] with row_scale float32 [M], weight e4m3 [N, K] with scale float32 [N] (W8A8); bias [N] in
    the dtype of out, or None; out [M, N], bfloat16 or float32.
    """
    dtype = compute_dtype(out)
    product = (x.to(dtype) @ weight.to(dtype).T) * row_scale.to(dtype)[:, None] * scale.to(dtype)
    return out.copy_(product if bias is None else product + bias.to(dtype))


def _takes_scaled_mm(call: Any) -> str | None:
    (rows, inputs), outputs = call.x.shape, len(call.weight)
    if inputs % SCALED_MM_UNIT or outputs % SCALED_MM_UNIT or not rows:
        return f"takes rows, and sides of the weight that are multiples of {SCALED_MM_UNIT}"
    if {call.x.dtype, call.weight.dtype} != {E4M3}:
        return "takes x and weight of torch.float8_e4m3fn"
    return takes_contiguous(call, "x", "row_scale", "weight", "scale", "out")


def _no_scaled_mm() -> str | None:
    """None if torch's product of scaled matrices runs on this machine's GPUs, else the reason."""
    return triton_backend.gpu_unavailable(triton_backend.E4M3_CAPABILITY)


@linear_fp8.implementation("scaled_mm", device="cuda", supports=_takes_scaled_mm, available=_no_scaled_mm)
def scaled_mm(
    x: Tensor, row_scale: Tensor, weight: Tensor, scale: Tensor, *, out: Tensor, bias: Tensor | None = None
) -> Tensor:
    """The same by torch's product of scaled matrices, which sums on the matrix units and gives bfloat16."""
    narrow = out if out.dtype == torch.bfloat16 else torch.empty_like(out, dtype=torch.bfloat16)
    torch._scaled_mm(**scaled_mm_arguments(x, row_scale, weight, scale, bias), out=narrow)
    return out if narrow is out else out.copy_(narrow)


def scaled_mm_arguments(
    x: Tensor, row_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None
) -> dict[str, Any]:
    """How torch is asked for it: the second matrix by columns, scales [M, 1] and [1, N]."""
    return {
        "input": x,
        "mat2": weight.t(),
        "scale_a": row_scale[:, None],
        "scale_b": scale[None, :],
        "bias": None if bias is None else bias.to(torch.bfloat16),
        "out_dtype": torch.bfloat16,
    }


@op(
    "x [..., K], scale [...] -> [..., K]",
    tolerance=1e-6,
    out_dtype="dtype",
)
def quantize_rows(
    x: Tensor, scale: Tensor, *, dtype: torch.dtype = torch.int8, out: Tensor | None = None
) -> Tensor:
    """round(x / scale) per row, int8 or e4m3, for x [M, K]; writes scale float32 [M]. Per-token quantization.

    A row's scale is max(abs(row)) divided by the largest value, 127 or 448, and 0 for a row of zeros. In a
    row that holds an infinity or a NaN the scale is that too, and the values are any. `out` receives the
    values and has their `dtype`.
    """
    exact, largest = x.to(compute_dtype(x)), largest_value(dtype)
    scale.copy_(exact.abs().amax(dim=-1) / largest)
    inverse = (1 / scale.to(exact.dtype)).nan_to_num(nan=0.0, posinf=0.0)
    values = (exact * inverse[..., None]).nan_to_num(nan=0.0)
    values = (values if dtype.is_floating_point else values.round_()).clamp_(-largest, largest)
    return cast_out(values, dtype, out)


def _makes_e4m3(call: Any) -> str | None:
    if call.dtype != E4M3:
        return "makes values of torch.float8_e4m3fn"
    return takes_rows(call, "x", "out") or takes_contiguous(call, "scale")


def _makes_int8(call: Any) -> str | None:
    return None if call.dtype == torch.int8 else "makes values of torch.int8"


quantize_rows.triton(dtypes=FLOATS, supports=_makes_e4m3, available=triton_backend.e4m3_unavailable)
quantize_rows.native("cpu", dtypes=FLOATS, supports=_makes_int8)


@op("values [M, K], weight [N, K] -> [M, N]", tolerance={torch.int8: 0.0}, out_dtype=torch.int32)
def integer_product(values: Tensor, weight: Tensor, *, out: Tensor | None = None) -> Tensor:
    """values weight^T for int8 values [M, K] and weight [N, K] -> int32 [M, N], exact."""
    return cast_out(F.linear(values.double(), weight.double()), torch.int32, out)


@functools.cache
def _no_int_mm() -> str | None:
    """Without VNNI torch multiplies bytes one by one, or adds pairs in 16 bits, which the largest exceed."""
    if VNNI.isdisjoint(processor().isa):
        return "no VNNI in this processor, so torch's product of integers is slow or not exact"
    largest = torch.full((64, 256), LARGEST_INT8, dtype=torch.int8)
    exact = bool((torch._int_mm(largest, largest.t()) == 256 * LARGEST_INT8**2).all())
    return None if exact else "torch's product of integers is not exact on this processor"


def _several_columns(call: Any) -> str | None:
    """A matrix of one column is its own transpose in memory, and torch takes it for the other of the two."""
    return None if call.values.shape[1] > 1 else "takes several columns: torch's product of one is wrong"


def _sides_for_cublas(call: Any) -> str | None:
    rows, inputs = call.values.shape
    if rows > 16 and inputs % CUBLAS_UNIT == 0 and len(call.weight) % CUBLAS_UNIT == 0:
        return None
    return f"takes more than 16 rows, and K and N that are multiples of {CUBLAS_UNIT}"


@integer_product.implementation("cublas", device="cuda", supports=_sides_for_cublas, available=cuda_status)
@integer_product.implementation("int_mm", device="cpu", supports=_several_columns, available=_no_int_mm)
def _(values: Tensor, weight: Tensor, *, out: Tensor | None = None) -> Tensor:
    return cast_out(torch._int_mm(values, weight.t()), torch.int32, out)


integer_product.native("cpu", dtypes=(torch.int8,))


@op("product [M, N], scale [N], row_scale [M], bias [N] -> [M, N]", tolerance=1e-6)
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
    [N] in the dtype of out. out [M, N] float32 or bfloat16; it may be product itself. Known as a
    dequantizing epilogue.
    """
    dtype = compute_dtype(out)
    result = product.to(dtype) * scale.to(dtype)
    if row_scale is not None:
        result = result * row_scale.to(dtype)[:, None]
    return out.copy_(result if bias is None else result + bias.to(dtype))


scale_product.native("cpu", dtypes=(torch.int32, *FLOATS))
