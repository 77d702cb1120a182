"""The page bookkeeping: reservation, sharing, copying, and that no page is ever lost."""

from __future__ import annotations

import pytest
import torch

from blip3o_rt.ar.kv_cache import PagedKVCache, Sequence
from blip3o_rt.errors import InsufficientMemoryError
from tests.ar.oracle import small_config


def make_cache(num_pages: int = 8, page_size: int = 4) -> PagedKVCache:
    return PagedKVCache(
        small_config(), num_pages, page_size=page_size, dtype=torch.float32, device=torch.device("cpu")
    )


@pytest.mark.parametrize(("positions", "pages"), [(1, 1), (4, 1), (5, 2), (8, 2), (32, 8)])
def test_reserves_whole_pages(positions: int, pages: int) -> None:
    cache, sequence = make_cache(), Sequence()
    cache.reserve(sequence, positions)
    assert len(sequence.block_table) == pages
    assert cache.free_pages == 8 - pages


def test_reserving_again_only_adds_what_is_missing() -> None:
    cache, sequence = make_cache(), Sequence()
    cache.reserve(sequence, 4)
    first = list(sequence.block_table)
    cache.reserve(sequence, 9)
    assert sequence.block_table[:1] == first
    assert len(set(sequence.block_table)) == 3


def test_exhaustion_names_the_pages_and_takes_none() -> None:
    cache, sequence = make_cache(num_pages=2), Sequence()
    with pytest.raises(InsufficientMemoryError, match=r"needs 3 more pages and has 2 free of 2"):
        cache.reserve(sequence, 12)
    assert cache.free_pages == 2


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8])
def test_fork_shares_full_pages_and_copies_the_partial_one(length: int) -> None:
    cache, parent = make_cache(), Sequence()
    cache.reserve(parent, length)
    parent.length = length
    for layer in cache.keys + cache.values:
        layer.copy_(torch.randn(layer.shape, generator=torch.Generator().manual_seed(length)))
    child = cache.fork(parent)
    full = length // cache.page_size
    assert child.block_table[:full] == parent.block_table[:full]
    assert set(child.block_table[full:]).isdisjoint(parent.block_table)
    for layer in range(2):
        for mine, theirs in zip(
            cache.gather(layer, child, length), cache.gather(layer, parent, length), strict=True
        ):
            assert torch.equal(mine, theirs)


def test_pages_come_back_whatever_the_order_of_release() -> None:
    cache, parent = make_cache(), Sequence()
    cache.reserve(parent, 7)
    parent.length = 7
    children = [cache.fork(parent) for _ in range(3)]
    cache.release(parent)
    assert cache.free_pages == 8 - 1 - 3  # one shared full page, three copied partial ones
    for child in children:
        cache.release(child)
    assert cache.free_pages == 8


def test_a_fork_that_does_not_fit_leaves_nothing_taken() -> None:
    cache, parent = make_cache(num_pages=2), Sequence()
    cache.reserve(parent, 7)
    parent.length = 7
    with pytest.raises(InsufficientMemoryError):
        cache.fork(parent)
    cache.release(parent)
    assert cache.free_pages == 2


def test_slots_follow_the_block_table() -> None:
    cache = make_cache()
    sequence = Sequence(block_table=[5, 2], length=0)
    assert cache.slots(sequence, 2, 6) == [22, 23, 8, 9]
