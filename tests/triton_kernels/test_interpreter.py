"""The interpreter rounds to bfloat16 as torch does, and multiplies the numbers that it rounded to."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="needs triton (requirements-dev.txt)")

import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from tests.triton_kernels import interpreter

SIDE = 16


def _multiply(a, b, rounded, product, side: tl.constexpr):
    index = tl.arange(0, side)
    place = index[:, None] * side + index[None, :]
    narrow = tl.load(a + place).to(tl.bfloat16)
    tl.store(rounded + place, narrow)
    tl.store(product + place, tl.dot(narrow, tl.load(b + place)))


@pytest.fixture(scope="module")
def multiplied() -> tuple[torch.Tensor, ...]:
    """a fp32, b bf16, then what became of a in bfloat16, and of its product with b."""
    interpreter.install()
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(SIDE, SIDE, generator=generator)
    steps = torch.arange(SIDE) * 2.0**-8  # halves of bfloat16's unit above 1: the odd ones tie
    a[0], a[1] = 1 + steps, -(1 + steps) * (1 + 2.0**-20)
    b = torch.randn(SIDE, SIDE, generator=generator).to(torch.bfloat16)
    rounded, product = torch.empty_like(b), torch.empty_like(a)
    InterpretedFunction(_multiply)[(1,)](a, b, rounded, product, side=SIDE)
    return a, b, rounded, product


def test_rounds_to_the_nearest_even(multiplied: tuple[torch.Tensor, ...]) -> None:
    a, _, rounded, _ = multiplied
    assert torch.equal(rounded, a.to(torch.bfloat16))


def test_multiplies_what_was_rounded(multiplied: tuple[torch.Tensor, ...]) -> None:
    a, b, _, product = multiplied
    exact = a.to(torch.bfloat16).double() @ b.double()
    torch.testing.assert_close(product.double(), exact, rtol=1e-6, atol=1e-5)  # sums of 16 in float32
    assert not torch.allclose(product.double(), a.double() @ b.double(), rtol=1e-6, atol=1e-3)
