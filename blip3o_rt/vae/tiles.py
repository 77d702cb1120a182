"""The fine stages of the autoencoder tile by tile, in a fraction of their memory.

Attention, which sees the whole image, is in the coarse stages; the fine ones hold nearly all of the memory
and are convolutions, which see what is near by. A tile is computed with a margin as wide as they reach
together, and cut back to itself: it is what the whole image has there, but for the rounding of convolutions
that may add in another order where sizes differ.
"""

from __future__ import annotations

from itertools import pairwise, product

import torch
from torch import Tensor

from blip3o_rt.vae.blocks import Block


def tiled_end(blocks: list[Block], tiles: int) -> list[Block]:
    """A decoder's blocks, those after its last attention as one that goes tile by tile."""
    if tiles == 1:
        return blocks
    first = max((index for index, block in enumerate(blocks) if block.reach is None), default=-1) + 1
    return [*blocks[:first], TiledBlocks(blocks[first:], tiles)]


def tiled_beginning(blocks: list[Block], tiles: int) -> list[Block]:
    """An encoder's blocks, those before its first attention as one that goes tile by tile."""
    if tiles == 1:
        return blocks
    first = next((index for index, block in enumerate(blocks) if block.reach is None), len(blocks))
    return [TiledBlocks(blocks[:first], tiles), *blocks[first:]]


class TiledBlocks(Block):
    """Local blocks one after the other, over `tiles` x `tiles` parts of an image; one part is all of it.

    A chain either doubles sizes or halves them. A tile consists of cells, which are pixels of the coarser
    end; a side with fewer cells than tiles is cut into cells.
    """

    def __init__(self, blocks: list[Block], tiles: int) -> None:
        self._blocks = blocks
        self._tiles = tiles
        self._cell_in = 2 ** sum(block.halves for block in blocks)  # pixels along the side of a cell, before
        self._cell_out = 2 ** sum(block.doubles for block in blocks)  # and after the blocks
        self.margin = _margin(blocks, self._cell_in, max(self._cell_in, self._cell_out))

    def __call__(self, x: Tensor) -> Tensor:
        """[1, H, W, C] to [1, H', W', C']."""
        rows, columns = (self._spans(side // self._cell_in) for side in x.shape[1:3])
        image: Tensor | None = None
        for (seen_rows, own_rows, to_rows), (seen_columns, own_columns, to_columns) in product(rows, columns):
            seen = x[:, seen_rows, seen_columns]  # its copy lives until the first block has read it
            tile = self._run(seen.clone(memory_format=torch.contiguous_format))[:, own_rows, own_columns]
            if image is None:
                image = tile.new_empty(1, rows[-1][2].stop, columns[-1][2].stop, tile.shape[3])
            image[:, to_rows, to_columns] = tile
        assert image is not None
        return image

    def _run(self, x: Tensor) -> Tensor:
        for block in self._blocks:
            x = block(x)
        return x

    def _spans(self, cells: int) -> list[tuple[slice, slice, slice]]:
        """Pixels of each tile of a side: what it is computed of, its own of the result, its place.

        In cells: `begin:end` without the margin, `first:last` with it.
        """
        count = min(self._tiles, cells)
        borders = [cells * tile // count for tile in range(count + 1)]
        spans = []
        for begin, end in pairwise(borders):  # in cells; first:last is begin:end with the margin
            first, last = max(0, begin - self.margin), min(cells, end + self.margin)
            seen, own = _pixels(first, last, self._cell_in), (begin - first, end - first, self._cell_out)
            spans.append((seen, _pixels(*own), _pixels(begin, end, self._cell_out)))
        return spans


def _pixels(begin: int, end: int, cell: int) -> slice:
    return slice(begin * cell, end * cell)


def _margin(blocks: list[Block], cell_in: int, cell: int) -> int:
    """Cells around a tile that its pixels look at.

    `depth` is how far from a border of what is given a result is wrong, in pixels of the finest side.
    """
    pixel, depth = cell // cell_in, 0
    for block in blocks:
        after = pixel // 2 if block.doubles else 2 * pixel if block.halves else pixel
        depth = -(-depth // pixel) * pixel  # a pixel is wrong as a whole
        depth += (block.reach or 0) * min(pixel, after)
        pixel = after
    return -(-depth // cell)
