"""Sequences that go on within a page and into the next, padding between them, and draws that are no token."""

from collections.abc import Iterator

import torch

from blip3o_rt.measure.validate.case import Case, int32


def case(label: str, page_size: int, context_lens: list[int], draws: list[int], max_blocks: int) -> Case:
    """Each sequence has a lane of its own; rows of context length 0 share the last."""
    rows, lane = len(context_lens), 9  # places of each
    pages = torch.randperm(rows * max_blocks, generator=torch.Generator().manual_seed(rows))
    page_table = pages.to(torch.int32).view(rows, max_blocks)
    drawn = int32(context % 7 if context else 0 for context in context_lens)
    lanes = torch.tensor([row if context else rows for row, context in enumerate(context_lens)])
    places = lanes.to(torch.int64) * lane + drawn
    kept = torch.full(((rows + 1) * lane,), -7)
    first_ids = torch.tensor([row % 2 * 151_936 for row in range(rows)], dtype=torch.int64)
    arguments = (
        *(torch.tensor(draws, dtype=torch.int64), first_ids, page_table, page_size),
        *(drawn, int32(context_lens), places, kept),
        *(int32([-5] * rows), int32([-5] * rows)),
    )
    return Case(label, arguments, written=(4, 5, 6, 7, 8, 9))


def cases() -> Iterator[Case]:
    yield case("one row", 16, [1], [5], 2)
    for page_size in (1, 3, 16):
        edges = [1, page_size, page_size + 1, 2 * page_size - 1, 3 * page_size - 1]
        yield case(f"edges of pages of {page_size}", page_size, edges, [9, 0, 2**16 - 1, 1, 3], 4)
    yield case("padding between", 4, [3, 0, 7, 0, 0, 8], [1, 2, 3, 4, 5, 6], 3)
    yield case("pages that are full", 4, [11, 12, 12, 1], [1, 2, 3, 4], 3)
    yield case("nothing but padding", 4, [0, 0, 0], [1, 2, -1], 3)
    yield case("draws that are no token", 4, [3, 5, 0], [-1, 4, -1], 3)
    yield case("as many rows as a batch has", 16, list(range(300, 364)), list(range(64)), 48)
    yield case("more than a block of threads", 16, [row % 50 for row in range(300)], list(range(300)), 4)
    yield case("no rows", 4, [], [], 1)
