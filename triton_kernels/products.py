"""Matrix products of float32 precision on the bfloat16 matrix units.

A float32 number is the sum of three bfloat16 ones of 8 significant bits each. Its product with a bfloat16
number is then three bfloat16 products summed in float32, and that of two float32 numbers is six, as the other
three are below 2^-24 of it: 3 or 6 times the work of a rounded product, on units that have some 15 times the
rate of float32 arithmetic. With `exact`, which is for models in float32, that arithmetic is used.
"""

import triton
import triton.language as tl


@triton.jit
def split(x):
    """Three bfloat16 tensors whose sum is x, the largest first."""
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def add_product(total, a, b, exact: tl.constexpr):
    """total + a @ b for float32 a and b."""
    if exact:
        total = tl.dot(a, b, total, input_precision="ieee")
    else:
        a_high, a_middle, a_low = split(a)
        b_high, b_middle, b_low = split(b)
        total = tl.dot(a_low, b_high, total)
        total = tl.dot(a_high, b_low, total)
        total = tl.dot(a_middle, b_middle, total)
        total = tl.dot(a_middle, b_high, total)
        total = tl.dot(a_high, b_middle, total)
        total = tl.dot(a_high, b_high, total)
    return total


@triton.jit
def add_narrow_product(total, a, b, exact: tl.constexpr):
    """total + a @ b for float32 a and b as loaded: bfloat16, or float32 where the product is to be exact."""
    if exact:
        total = tl.dot(a, b, total, input_precision="ieee")
    else:
        high, middle, low = split(a)
        total = tl.dot(low, b, total)
        total = tl.dot(middle, b, total)
        total = tl.dot(high, b, total)
    return total
