"""The memory that the blocks of a step use in turn."""

from __future__ import annotations

import mmap

import pytest
import torch

from blip3o_rt.dit.workspace import Activations, Area, Workspace


def workspace(elements: int) -> Workspace:
    return Workspace(torch.bfloat16, torch.device("cpu"), dict.fromkeys(Area, elements))


def take(memory: Workspace, area: Area, *shapes: tuple[int, ...]) -> Activations:
    return memory.take(area, [torch.empty(*shape[:-1], 1) for shape in shapes], shapes[0][-1])


def test_an_area_is_the_same_memory_each_time() -> None:
    memory = workspace(3 << 20)
    (wide,) = take(memory, Area.WIDE, (2, 3, 7)).images
    (narrow,) = take(memory, Area.NARROW, (1, 3 << 20)).images
    assert wide.shape == (2, 3, 7)
    assert wide.is_contiguous()
    assert wide.dtype == torch.bfloat16
    wide.fill_(1)
    narrow.fill_(2)
    again = take(memory, Area.WIDE, (6, 7)).rows
    assert again.data_ptr() == wide.data_ptr()
    assert (again == 1).all()


def test_images_lie_one_below_another() -> None:
    rows, images = take(workspace(100), Area.WIDE, (2, 3, 5), (1, 4, 5))
    assert rows.shape == (10, 5)
    assert [image.shape for image in images] == [(2, 3, 5), (1, 4, 5)]
    rows.copy_(torch.arange(50).view(10, 5))
    assert torch.equal(torch.cat([image.flatten() for image in images]), rows.flatten())


def test_images_are_joined_and_one_stays_where_it_is() -> None:
    memory, images = workspace(100), [torch.full((1, 2, 3), 1.0), torch.full((2, 1, 3), 2.0)]
    joined = memory.joined(Area.WIDE, images)
    assert torch.equal(joined.rows, torch.cat([image.flatten(0, 1) for image in images]))
    alone = memory.joined(Area.WIDE, images[1:])
    assert alone.rows.data_ptr() == images[1].data_ptr()


def test_memory_outlives_its_workspace() -> None:
    taken = take(workspace(1000), Area.MIDDLE, (10, 100)).rows
    taken.fill_(3)
    assert (taken == 3).all()


def test_no_more_than_there_is() -> None:
    with pytest.raises(RuntimeError, match="shape"):
        take(workspace(100), Area.WIDE, (101, 1))
    assert take(workspace(0), Area.WIDE, (0, 5)).rows.shape == (0, 5)


def test_systems_without_large_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    taken = take(workspace(1000), Area.WIDE, (10, 100)).rows
    assert (taken.fill_(4) == 4).all()
