"""The fine stages of the autoencoder tile by tile, in a fraction of their memory.

Attention, which sees the whole image, is in the coarse stages; the fine ones hold nearly all of the memory
and are convolutions, which see what is near by. A tile is computed with a margin as wide as they reach
together, and cut back to itself: it is what the whole image has there, but for the rounding of convolutions
that may add in another order where sizes differ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from blip3o_rt.vae.blocks import (
    Convolution,
    Downsampling,
    EfficientViTBlock,
    LatentIn,
    LatentOut,
    NearestUpsampling,
    NormRelu,
    ResidualBlock,
    ShuffleUpsampling,
)

Block = Callable[[Tensor], Tensor]

REACH: dict[type, int | None] = {
    Convolution: 1,
    ResidualBlock: 2,
    NormRelu: 0,
    NearestUpsampling: 1,
    ShuffleUpsampling: 2,
    Downsampling: 1,
    LatentIn: 1,
    LatentOut: 1,
    EfficientViTBlock: None,
}
"""How far a pixel of a block's result looks, in pixels of the finer of its two sides; None: everywhere."""


def tiled_end(blocks: list[Block], tiles: int) -> list[Block]:
    """A decoder's blocks, those after its last attention as one that goes tile by tile."""
    if tiles == 1:
        return blocks
    first = max((index for index, block in enumerate(blocks) if _sees_all(block)), default=-1) + 1
    return [*blocks[:first], TiledBlocks(blocks[first:], tiles)]


def tiled_beginning(blocks: list[Block], tiles: int) -> list[Block]:
    """An encoder's blocks, those before its first attention as one that goes tile by tile."""
    if tiles == 1:
        return blocks
    first = next((index for index, block in enumerate(blocks) if _sees_all(block)), len(blocks))
    return [TiledBlocks(blocks[:first], tiles), *blocks[first:]]


def _reach(block: Block) -> int | None:
    """REACH of a block's class, or of the one that it derives from."""
    return next(REACH[kind] for kind in type(block).__mro__ if kind in REACH)


def _sees_all(block: Block) -> bool:
    return _reach(block) is None


@dataclass(frozen=True)
class Span:
    """Cells of one side: those of a tile, and those it is computed of, its margins with it."""

    begin: int
    end: int
    first: int
    last: int


class TiledBlocks:
    """Local blocks one after the other, over `tiles` x `tiles` parts of an image; one part is all of it.

    A chain either doubles sizes or halves them. A tile consists of cells, which are pixels of the coarser
    end; a side with fewer cells than tiles is cut into cells.
    """

    def __init__(self, blocks: list[Block], tiles: int) -> None:
        self._blocks = blocks
        self._tiles = tiles
        self._cell_in, self._cell_out = _cell(blocks)
        self.margin = _margin(blocks, self._cell_in, max(self._cell_in, self._cell_out))

    def __call__(self, x: Tensor) -> Tensor:
        """[1, H, W, C] to [1, H', W', C']."""
        height, width = (side // self._cell_in for side in x.shape[1:3])
        image: Tensor | None = None
        for rows in self._spans(height):
            for columns in self._spans(width):
                part = x[:, _pixels(rows.first, rows.last, self._cell_in)]
                part = part[:, :, _pixels(columns.first, columns.last, self._cell_in)]
                tile = self._run(part.clone(memory_format=torch.contiguous_format))
                tile = tile[:, _pixels(rows.begin - rows.first, rows.end - rows.first, self._cell_out)]
                begin, end = columns.begin - columns.first, columns.end - columns.first
                tile = tile[:, :, _pixels(begin, end, self._cell_out)]
                if image is None:
                    sides = height * self._cell_out, width * self._cell_out
                    image = tile.new_empty(1, *sides, tile.shape[3])
                place = image[:, _pixels(rows.begin, rows.end, self._cell_out)]
                place[:, :, _pixels(columns.begin, columns.end, self._cell_out)] = tile
        assert image is not None
        return image

    def _run(self, x: Tensor) -> Tensor:
        for block in self._blocks:
            x = block(x)
        return x

    def _spans(self, cells: int) -> list[Span]:
        count = min(self._tiles, cells)
        borders = [cells * tile // count for tile in range(count + 1)]
        return [
            Span(begin, end, max(0, begin - self.margin), min(cells, end + self.margin))
            for begin, end in pairwise(borders)
        ]


def _pixels(begin: int, end: int, cell: int) -> slice:
    return slice(begin * cell, end * cell)


def _cell(blocks: list[Block]) -> tuple[int, int]:
    """Pixels along the side of a cell, before and after the blocks."""
    doubled = sum(isinstance(block, NearestUpsampling | ShuffleUpsampling) for block in blocks)
    halved = sum(_halves(block) for block in blocks)
    return 2**halved, 2**doubled


def _halves(block: Block) -> bool:
    return isinstance(block, Downsampling)


def _margin(blocks: list[Block], cell_in: int, cell: int) -> int:
    """Cells around a tile that its pixels look at.

    `depth` is how far from a border of what is given a result is wrong, in pixels of the finest side.
    """
    pixel, depth = cell // cell_in, 0
    for block in blocks:
        doubles = isinstance(block, NearestUpsampling | ShuffleUpsampling)
        after = pixel // 2 if doubles else 2 * pixel if _halves(block) else pixel
        depth = -(-depth // pixel) * pixel  # a pixel is wrong as a whole
        depth += (_reach(block) or 0) * min(pixel, after)
        pixel = after
    return -(-depth // cell)
