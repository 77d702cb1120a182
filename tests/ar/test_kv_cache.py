"""The page bookkeeping: reservation, sharing, copying, and that no page is ever lost."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from blip3o_rt.ar.kv_cache import PagedKVCache, Sequence
from blip3o_rt.errors import InsufficientMemoryError
from tests.ar.oracle import cached, small_config


def make_cache(num_pages: int = 8, page_size: int = 4) -> PagedKVCache:
    return PagedKVCache(
        small_config(), num_pages, page_size=page_size, dtype=torch.float32, device=torch.device("cpu")
    )


@pytest.mark.parametrize(("positions", "pages"), [(1, 1), (4, 1), (5, 2), (8, 2), (32, 8)])
def test_reserves_whole_pages(positions: int, pages: int) -> None:
    cache, sequence = make_cache(), Sequence()
    cache.reserve(sequence, positions)
    assert len(sequence.page_table) == pages
    assert cache.free_pages == 8 - pages


def test_reserving_again_only_adds_what_is_missing() -> None:
    cache, sequence = make_cache(), Sequence()
    cache.reserve(sequence, 4)
    first = list(sequence.page_table)
    cache.reserve(sequence, 9)
    assert sequence.page_table[:1] == first
    assert len(set(sequence.page_table)) == 3


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
    child = cache.fork(parent, parent.length)
    full = length // cache.page_size
    assert child.page_table[:full] == parent.page_table[:full]
    assert set(child.page_table[full:]).isdisjoint(parent.page_table)
    for index in range(2):
        for mine, theirs in zip(
            cached(cache, index, child, length), cached(cache, index, parent, length), strict=True
        ):
            assert torch.equal(mine, theirs)


def test_pages_come_back_whatever_the_order_of_release() -> None:
    cache, parent = make_cache(), Sequence()
    cache.reserve(parent, 7)
    parent.length = 7
    children = [cache.fork(parent, parent.length) for _ in range(3)]
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
        cache.fork(parent, parent.length)
    cache.release(parent)
    assert cache.free_pages == 2


def test_slots_follow_the_page_table() -> None:
    cache = make_cache()
    sequence = Sequence(page_table=[5, 2], length=0)
    assert cache.slot_mapping(sequence, 2, 6) == [22, 23, 8, 9]


@pytest.mark.parametrize("length", [1, 4, 6, 8])
def test_a_fork_may_take_less_than_its_parent_has(length: int) -> None:
    cache, parent = make_cache(), Sequence()
    cache.reserve(parent, 9)
    parent.length = 9
    child = cache.fork(parent, length)
    assert child.length == length
    assert len(child.page_table) == cache.pages_for(length)
    assert child.page_table[: length // 4] == parent.page_table[: length // 4]
    assert set(child.page_table[length // 4 :]).isdisjoint(parent.page_table)


class Pool(RuleBasedStateMachine):
    """Any order of growing, forking and releasing: each sequence keeps what was written to it, beside a model
    that knows nothing of pages."""

    @initialize(num_pages=st.integers(1, 12), page_size=st.integers(1, 5))
    def start(self, num_pages: int, page_size: int) -> None:
        self.cache = make_cache(num_pages, page_size)
        self.live: list[tuple[Sequence, list[float]]] = []
        self.written = 0

    def write(self, sequence: Sequence, contents: list[float], count: int) -> None:
        for slot in self.cache.slot_mapping(sequence, len(contents), len(contents) + count):
            self.written += 1
            self.cache.keys[0][slot // self.cache.page_size, :, slot % self.cache.page_size] = self.written
            contents.append(self.written)
        sequence.length = len(contents)

    @rule(count=st.integers(1, 9))
    def begin(self, count: int) -> None:
        sequence = Sequence()
        contents: list[float] = []
        self.grow_one(sequence, contents, count)
        if contents:
            self.live.append((sequence, contents))

    def grow_one(self, sequence: Sequence, contents: list[float], count: int) -> None:
        free, held = self.cache.free_pages, list(sequence.page_table)
        missing = self.cache.pages_for(len(contents) + count) - len(held)
        if missing > free:
            with pytest.raises(InsufficientMemoryError):
                self.cache.reserve(sequence, len(contents) + count)
            assert (self.cache.free_pages, sequence.page_table) == (free, held)
        else:
            self.cache.reserve(sequence, len(contents) + count)
            assert self.cache.free_pages == free - max(missing, 0)
            self.write(sequence, contents, count)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), count=st.integers(1, 9))
    def grow(self, data: st.DataObject, count: int) -> None:
        self.grow_one(*data.draw(st.sampled_from(self.live)), count)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        parent, contents = data.draw(st.sampled_from(self.live))
        length = data.draw(st.integers(0, len(contents)))
        free = self.cache.free_pages
        if length % self.cache.page_size and free == 0:
            with pytest.raises(InsufficientMemoryError):
                self.cache.fork(parent, length)
            assert self.cache.free_pages == 0
            return
        child = self.cache.fork(parent, length)
        assert self.cache.free_pages == free - bool(length % self.cache.page_size)
        self.live.append((child, contents[:length]))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.live) - 1))
        sequence, _ = self.live.pop(index)
        self.cache.release(sequence)
        self.cache.release(sequence)  # a second time does nothing

    @invariant()
    def everyone_has_what_was_written(self) -> None:
        for sequence, contents in getattr(self, "live", []):
            keys, _ = cached(self.cache, 0, sequence, len(contents))
            assert keys[:, 0, 0].tolist() == contents
            assert keys[:, -1, -1].tolist() == contents

    @invariant()
    def every_page_is_free_or_held(self) -> None:
        if hasattr(self, "live"):
            held = {page for sequence, _ in self.live for page in sequence.page_table}
            assert self.cache.free_pages == self.cache.num_pages - len(held)

    def teardown(self) -> None:
        for sequence, _ in getattr(self, "live", []):
            self.cache.release(sequence)
        if hasattr(self, "cache"):
            assert self.cache.free_pages == self.cache.num_pages


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=25, stateful_step_count=25, deadline=None, derandomize=True)
