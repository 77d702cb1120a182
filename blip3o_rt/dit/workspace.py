"""Memory for the activations of one step, which its blocks use in turn."""

from __future__ import annotations

import math
import mmap
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
        allocate = _large_pages if device.type == "cpu" else torch.empty
        self._memory = {area: allocate(size, dtype=dtype, device=device) for area, size in sizes.items()}

    def take(self, area: Area, *shape: int) -> Tensor:
        """Anything of that shape, contiguous; what was taken from the area before is lost."""
        return self._memory[area][: math.prod(shape)].view(shape)


def _large_pages(size: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """As torch.empty, in large pages where the system has them for those who ask.

    The rows that a product passes over again and again lie on more pages of 4 KiB than the processor keeps
    addresses of.
    """
    try:
        memory = mmap.mmap(-1, size * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
    except (AttributeError, OSError, ValueError):  # not of this system, no memory left, or none asked for
        return torch.empty(size, dtype=dtype, device=device)
    return torch.frombuffer(memory, dtype=dtype)
