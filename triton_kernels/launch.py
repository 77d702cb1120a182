"""How kernels are launched: tiles by a fixed rule of the shape, rows by their distance in memory."""

import triton
from torch import Tensor

TILE_ELEMENTS = 4096  # of a program that works on whole rows


def options(num_warps: int, num_stages: int = 2) -> dict[str, int | bool]:
    """What the compiler is told besides the kernel's constants; nothing is left to a release's default."""
    return {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}


def block_of(size: int, least: int = 1) -> int:
    """The tile side that covers `size`: the next power of two."""
    return max(least, triton.next_power_of_2(size))


def row_tile(width: int) -> tuple[int, int]:
    """(rows, columns) of a tile that covers the width: several narrow rows, or one wide one."""
    columns = block_of(width)
    return max(1, TILE_ELEMENTS // columns), columns


def row_warps(width: int) -> int:
    """Warps of a program of such a tile: 16 elements a thread, 32 of a very wide row."""
    return 8 if block_of(width) <= TILE_ELEMENTS else 16


def as_rows(x: Tensor) -> Tensor:
    """[..., D] as [rows, D], the same memory. Raises RuntimeError where the rows lie at several distances."""
    return x.view(-1, x.shape[-1])
