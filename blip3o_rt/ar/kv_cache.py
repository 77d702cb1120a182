"""The paged key/value cache: fixed-size pages, page tables, and prefix pages shared between sequences."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from blip3o_rt.config import ARConfig
from blip3o_rt.errors import InsufficientMemoryError

DEFAULT_PAGE_SIZE = 16


@dataclass
class Sequence:
    """One sequence's place in the cache: its pages in order, and how many positions are taken."""

    page_table: list[int] = field(default_factory=list)
    length: int = 0


class PagedKVCache:
    """Keys and values of all layers in pages of `page_size` positions, allocated once.

    `keys[layer]` and `values[layer]` are [num_pages, num_kv_heads, page_size, head_dim]. A page may belong to
    several sequences as long as none writes to it: `fork` shares the full pages and copies the last,
    partial one. Pages are counted by their owners, and only a sequence owns pages.
    """

    def __init__(
        self,
        config: ARConfig,
        num_pages: int,
        *,
        page_size: int = DEFAULT_PAGE_SIZE,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_pages, config.num_kv_heads, page_size, config.head_dim)
        self.page_size = page_size
        self.num_pages = num_pages
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self._free = list(range(num_pages - 1, -1, -1))
        self._owners = [0] * num_pages

    @property
    def free_pages(self) -> int:
        return len(self._free)

    def pages_for(self, positions: int) -> int:
        """Pages that a sequence of so many positions takes."""
        return -(-positions // self.page_size)

    def reserve(self, sequence: Sequence, positions: int) -> None:
        """Give the sequence pages for `positions` positions in all.

        Raises InsufficientMemoryError, and takes none, when too few are free.
        """
        missing = self.pages_for(positions) - len(sequence.page_table)
        if missing > len(self._free):
            raise InsufficientMemoryError(
                f"the key/value cache needs {missing} more pages and has {len(self._free)} free "
                f"of {self.num_pages}; "
                "load the pipeline with a larger max_batch or generate fewer images at once"
            )
        for _ in range(missing):
            page = self._free.pop()
            self._owners[page] = 1
            sequence.page_table.append(page)

    def fork(self, parent: Sequence, length: int) -> Sequence:
        """A sequence with the parent's first `length` positions.

        Full pages are shared; a partly filled last page is copied.

        Raises InsufficientMemoryError, and takes none, when there is no page for the copy.
        """
        full, rest = divmod(length, self.page_size)
        child = Sequence()
        if rest:
            self.reserve(child, rest)
            source, target = parent.page_table[full], child.page_table[0]
            for cache in (*self.keys, *self.values):
                cache[target].copy_(cache[source])
        for page in parent.page_table[:full]:
            self._owners[page] += 1
        child.page_table[:0] = parent.page_table[:full]
        child.length = length
        return child

    def release(self, sequence: Sequence) -> None:
        """Return the sequence's pages; a shared page stays until its last owner lets go."""
        for page in sequence.page_table:
            self._owners[page] -= 1
            if self._owners[page] == 0:
                self._free.append(page)
        sequence.page_table = []
        sequence.length = 0

    def slot_mapping(self, sequence: Sequence, start: int, stop: int) -> list[int]:
        """Flat cache slots (page * page_size + offset) of positions start..stop-1."""
        return [
            sequence.page_table[position // self.page_size] * self.page_size + position % self.page_size
            for position in range(start, stop)
        ]
