"""Memory for the activations of one step, which its blocks use in turn."""

from __future__ import annotations

import math
from enum import Enum, auto

import torch
from torch import Tensor


class Area(Enum):
    """What a block never needs two of at a time, by their widths."""

    WIDE = auto()  # q|k|v, and what the feed-forward expands to
    MIDDLE = auto()  # what an attention found, and what the feed-forward's gate lets through
    NARROW = auto()  # what goes into a product or comes out, as wide as the model


class Workspace:
    """One piece of memory for each area, of so many elements.

    On a CPU tensors of tens of megabytes come fresh from the operating system each time and go back to it, at
    the price of a fault for every page: thousands in every block (`bench --ablate dit.step`, activations).
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, sizes: dict[Area, int]) -> None:
        self._memory = {area: torch.empty(size, dtype=dtype, device=device) for area, size in sizes.items()}

    def take(self, area: Area, *shape: int) -> Tensor:
        """Anything of that shape, contiguous; what was taken from the area before is lost."""
        return self._memory[area][: math.prod(shape)].view(shape)
