"""Makes Triton's interpreter compute what the hardware does.

It keeps bfloat16 as 16-bit integers: without this its products are those of bit patterns, and its casts
truncate. Casts to 8-bit floating point are torch's, which round to nearest even. A maximum drops NaN, as that
of the hardware does. And the bounds of loops, which it keeps as arrays of one element, are numbers to any
numpy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

BFLOAT16, E4M3, FLOAT32 = tl.bfloat16, tl.float8e4nv, tl.float32


def widened(bits: Any) -> Any:
    """Numbers of bfloat16 bit patterns, in float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(numbers: Any) -> Any:
    """Bit patterns of float32 numbers rounded to bfloat16, ties to even, NaN kept."""
    bits = np.ascontiguousarray(numbers, dtype=np.float32).view(np.uint32)
    up = bits + 0x7FFF + ((bits >> 16) & 1)
    return np.where(np.isnan(numbers), 0x7FC0, up >> 16).astype(np.uint16)


def install() -> None:
    """Replace the interpreter's casts, products and maxima, and what a loop's bound is."""
    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot
    convert = InterpreterBuilder.create_fp_to_fp
    patch = interpreter._patch_lang_tensor

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        kinds = source.dtype.scalar, target.scalar
        if kinds == (BFLOAT16, FLOAT32):
            return TensorHandle(widened(source.data), FLOAT32)
        if kinds == (FLOAT32, BFLOAT16):
            return TensorHandle(rounded(source.data), BFLOAT16)
        return cast(self, source, target)

    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if (source.dtype.scalar, target.scalar) == (FLOAT32, E4M3):
            numbers = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.float8_e4m3fn)
            return TensorHandle(numbers.view(torch.uint8).numpy(), E4M3)
        return convert(self, source, target, rounding_mode)

    def create_dot(self: Any, a: Any, b: Any, total: Any, *rest: Any) -> Any:
        if BFLOAT16 in (a.dtype.scalar, b.dtype.scalar):
            a, b = (TensorHandle(widened(handle.data), FLOAT32) for handle in (a, b))
        return dot(self, a, b, total, *rest)

    def patch_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def create_maxnumf(self: Any, a: Any, b: Any) -> Any:
        return self.binary_op(a, b, np.fmax)

    interpreter._patch_lang_tensor = patch_tensor
    InterpreterBuilder.create_maxnumf = create_maxnumf
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp
    InterpreterBuilder.create_dot = create_dot
