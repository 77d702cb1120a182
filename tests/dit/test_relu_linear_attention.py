"""The linear attention against its quadratic definition, down to denominators where its epsilon shows."""

from __future__ import annotations

import pytest
import torch

from blip3o_rt import ops


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e-8])
def test_equals_the_quadratic_definition(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 9, 3, 8, generator=generator, dtype=torch.float64)  # [2, N, heads, d] each
    q, k = scale * q, scale * k
    weights = torch.einsum("bnhd,bmhd->bhnm", q.relu(), k.relu())
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-15)
    expected = torch.einsum("bhnm,bmhd->bnhd", weights, v).flatten(2)
    qkv = torch.cat([q, k, v], dim=2).flatten(2).float()
    found = ops.relu_linear_attention(qkv, None, None, 3, 1e-5)
    torch.testing.assert_close(
        found.double(), expected, rtol=1e-5, atol=1e-5
    )  # float32 sums of nine products
