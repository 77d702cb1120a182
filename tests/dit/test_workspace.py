"""The memory that the blocks of a step use in turn."""

from __future__ import annotations

import mmap

import pytest
import torch

from blip3o_rt.dit.workspace import Area, Workspace


def workspace(elements: int) -> Workspace:
    return Workspace(torch.bfloat16, torch.device("cpu"), dict.fromkeys(Area, elements))


def test_an_area_is_the_same_memory_each_time() -> None:
    memory = workspace(3 << 20)
    wide, narrow = memory.take(Area.WIDE, 2, 3, 7), memory.take(Area.NARROW, 3 << 20)
    assert wide.shape == (2, 3, 7)
    assert wide.is_contiguous()
    assert wide.dtype == torch.bfloat16
    wide.fill_(1)
    narrow.fill_(2)
    again = memory.take(Area.WIDE, 42)
    assert again.data_ptr() == wide.data_ptr()
    assert (again == 1).all()


def test_memory_outlives_its_workspace() -> None:
    taken = workspace(1000).take(Area.MIDDLE, 1000)
    taken.fill_(3)
    assert (taken == 3).all()


def test_no_more_than_there_is() -> None:
    with pytest.raises(RuntimeError, match="shape"):
        workspace(100).take(Area.WIDE, 101)
    assert workspace(0).take(Area.WIDE, 0, 5).shape == (0, 5)


def test_systems_without_large_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    taken = workspace(1000).take(Area.WIDE, 1000)
    assert (taken.fill_(4) == 4).all()
