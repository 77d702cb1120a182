"""How far one result is from another."""

from __future__ import annotations

from torch import Tensor


def relative_l2(found: Tensor, expected: Tensor) -> float:
    """L2 norm of the difference over that of the expected values. Raises ValueError for different shapes."""
    if found.shape != expected.shape:
        raise ValueError(f"{list(found.shape)} against {list(expected.shape)}")
    return float((found.double() - expected.double()).norm() / expected.double().norm())
