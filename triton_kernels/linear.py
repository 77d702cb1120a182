"""Products with a weight matrix: x weight^T + bias, where a row's bits do not depend on the other rows.

With a gate the product is added to what is there: out += gate * product.

Tiling   a program per tile of 128 rows and 128 outputs (64 x 64 in float32), which adds up the products of 64
         (16) channels at a time in their order. Tiles are taken in groups of 8 down and all across, so that
         the second-level cache holds what neighbors share. Nothing is split or tuned by the number of rows:
         that is what makes a row's sum the same sum in any batch.
Bytes    each tile of x once per 128 outputs, each of weight once per 128 rows, mostly from the second-level
         cache; out once.
         With a gate out is read too, which saves a pass that reads the product and out and writes out.
FLOPs    2 M N K; in bfloat16 on the matrix units.
Bound    arithmetic, with many rows.
To tune  Tiles of 128 x 256, loads by tensor descriptors, and programs that stay and take tile after tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import as_rows, options

GROUP = 8  # tiles of rows


@triton.jit
def _linear(
    x,
    weight,
    bias,
    gate,
    out,
    rows,
    outputs,
    inputs,
    x_row,
    x_column,
    weight_row,
    out_row,
    group: tl.constexpr,
    block_rows: tl.constexpr,
    block_outputs: tl.constexpr,
    block_inputs: tl.constexpr,
):
    row_tiles, across = tl.cdiv(rows, block_rows), tl.cdiv(outputs, block_outputs)
    first = tl.program_id(0) // (group * across) * group
    down = min(row_tiles - first, group)
    place = tl.program_id(0) % (group * across)
    row = (first + place % down) * block_rows + tl.arange(0, block_rows)
    output = place // down * block_outputs + tl.arange(0, block_outputs)
    row, output = row.to(tl.int64), output.to(tl.int64)
    channel = tl.arange(0, block_inputs)
    x_place = x + row[:, None] * x_row + channel[None, :] * x_column
    weight_place = weight + output[None, :] * weight_row + channel[:, None]
    total = tl.zeros((block_rows, block_outputs), tl.float32)
    for done in range(0, inputs, block_inputs):
        left = inputs - done
        a = tl.load(x_place, mask=(row < rows)[:, None] & (channel < left)[None, :], other=0.0)
        b = tl.load(weight_place, mask=(channel < left)[:, None] & (output < outputs)[None, :], other=0.0)
        total = tl.dot(a, b.to(a.dtype), total, input_precision="ieee")
        x_place += block_inputs * x_column
        weight_place += block_inputs
    if bias is not None:
        total += tl.load(bias + output, mask=output < outputs, other=0.0).to(tl.float32)[None, :]
    if gate is None:
        inside = (row < rows)[:, None] & (output < outputs)[None, :]
        tl.store(out + row[:, None] * out_row + output[None, :], total.to(out.dtype.element_ty), mask=inside)
    else:  # in halves, which need fewer registers
        half: tl.constexpr = block_outputs // 2
        low, high = tl.split(tl.permute(tl.reshape(total, (block_rows, 2, half)), (0, 2, 1)))
        output = place // down * block_outputs + tl.arange(0, half).to(tl.int64)
        _add_gated(low, gate, out, row, output, rows, outputs, out_row)
        _add_gated(high, gate, out, row, output + half, rows, outputs, out_row)


@triton.jit
def _add_gated(product, gate, out, row, output, rows, outputs, out_row):
    """out += gate * product, which is rounded before, as a product of its own is."""
    place = out + row[:, None] * out_row + output[None, :]
    inside = (row < rows)[:, None] & (output < outputs)[None, :]
    added = product.to(out.dtype.element_ty).to(tl.float32)
    added *= tl.load(gate + output, mask=output < outputs, other=0.0).to(tl.float32)[None, :]
    total = tl.load(place, mask=inside, other=0.0).to(tl.float32) + added
    tl.store(place, total.to(out.dtype.element_ty), mask=inside)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """x [..., K], weight [N, K] with contiguous rows, bias [N] contiguous, out [..., N] with rows alike."""
    launch(x, weight, bias, None, out)


def launch(x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None, out: Tensor) -> None:
    """The same, or with a gate [N] contiguous out += gate * the product."""
    x, out = x if x.ndim == 2 else as_rows(x), as_rows(out)
    side, block_inputs, stages = (64, 16, 2) if x.dtype == torch.float32 else (128, 64, 3)
    tiles = triton.cdiv(len(x), side) * triton.cdiv(len(weight), side)
    _linear[(tiles,)](
        x,
        weight,
        bias,
        gate,
        out,
        len(x),
        len(weight),
        x.shape[1],
        x.stride(0),
        x.stride(1),
        weight.stride(0),
        out.stride(0),
        group=GROUP,
        block_rows=side,
        block_outputs=side,
        block_inputs=block_inputs,
        **options(8, stages),
    )
