"""Memory for the activations of one step of one or more images, which its blocks use in turn."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from enum import Enum, auto
from typing import NamedTuple

import torch
from torch import Tensor

from blip3o_rt.ops.layer import Linear


class Area(Enum):
    """What a block never needs two of at a time, by their widths."""

    WIDE = auto()  # q|k|v, and what the feed-forward expands to
    MIDDLE = auto()  # what an attention found, and what the feed-forward's gate lets through
    NARROW = auto()  # what goes into a product or comes out, as wide as the model


class Activations(NamedTuple):
    """Activations of the images of a step, the rows of one image below those of another.

    Attributes:
        rows: [R, width], those of all images: what one product takes.
        images: [branches, N, width], each image's part of them.
    """

    rows: Tensor
    images: list[Tensor]

    def product(self, layer: Linear, out: Activations) -> Activations:
        """The layer's product with every image, of all rows at once where an image keeps its bits so."""
        if len(self.images) == 1 or layer.batch_invariant(self.rows, out.rows):
            layer(self.rows, out=out.rows)
        else:
            for image, result in zip(self.images, out.images, strict=True):
                layer(image.flatten(0, -2), out=result.flatten(0, -2))
        return out


class Workspace:
    """One piece of memory for each area, of so many elements.

    On a CPU tensors of tens of megabytes come fresh from the operating system each time and go back to it, at
    the price of a fault for every page: thousands in every block (`bench --ablate dit.step`, activations).
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, sizes: dict[Area, int]) -> None:
        allocate = _large_pages if device.type == "cpu" else torch.empty
        self._memory = {area: allocate(size, dtype=dtype, device=device) for area, size in sizes.items()}

    def take(self, area: Area, like: Sequence[Tensor], width: int) -> Activations:
        """Anything, `width` wide, for images of as many rows as `like`; loses what the area held before."""
        counts = [image.shape[:-1].numel() for image in like]
        rows = self._memory[area][: sum(counts) * width].view(sum(counts), width)
        parts = zip(rows.split(counts), like, strict=True)
        return Activations(rows, [part.view(*image.shape[:-1], width) for part, image in parts])

    def joined(self, area: Area, images: Sequence[Tensor]) -> Activations:
        """Tensors [branches, N, width] as activations; that of a single image stays where it is."""
        if len(images) == 1:
            return Activations(images[0].flatten(0, -2), [images[0]])
        activations = self.take(area, images, images[0].shape[-1])
        for image, part in zip(images, activations.images, strict=True):
            part.copy_(image)
        return activations


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
