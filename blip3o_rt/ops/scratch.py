"""Scratch memory of kernels, held by their caller from call to call, so that a call allocates nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Scratch:
    """Memory that the calls on one stream use in turn, each as long as it runs.

    It grows where a call asks for more than any before. What was given out once stays as long as this object,
    because a captured graph goes on using it: make the largest call first.
    """

    def __init__(self) -> None:
        self._areas: dict[tuple[Callable[..., Tensor], torch.dtype, torch.device], list[Tensor]] = {}

    def memory(self, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """At least `count` elements of anything."""
        return self._area(torch.empty, count, dtype, device)

    def counters(self, count: int, device: torch.device) -> Tensor:
        """At least `count` zeros, int32, which the call must leave as zeros."""
        return self._area(torch.zeros, count, torch.int32, device)

    def _area(
        self, make: Callable[..., Tensor], count: int, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        areas = self._areas.setdefault((make, dtype, device), [])
        if not areas or len(areas[-1]) < count:
            areas.append(make(count, dtype=dtype, device=device))
        return areas[-1]
