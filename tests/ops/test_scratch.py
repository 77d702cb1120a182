"""Scratch memory stays where it was given out, and is made anew only for more than ever before."""

from __future__ import annotations

import torch

from blip3o_rt import ops

CPU = torch.device("cpu")


def test_memory_is_the_same_until_more_is_asked_for() -> None:
    scratch = ops.Scratch()
    first = scratch.memory(100, torch.float32, CPU)
    assert scratch.memory(7, torch.float32, CPU).data_ptr() == first.data_ptr()
    larger = scratch.memory(101, torch.float32, CPU)
    assert len(larger) >= 101
    assert larger.data_ptr() != first.data_ptr()  # both are kept: a graph may use the first
    assert scratch.memory(100, torch.float32, CPU).data_ptr() == larger.data_ptr()


def test_counters_and_other_dtypes_are_memory_of_their_own() -> None:
    scratch = ops.Scratch()
    areas = [
        scratch.memory(8, torch.float32, CPU),
        scratch.memory(8, torch.int64, CPU),
        scratch.memory(8, torch.int32, CPU),
        scratch.counters(8, CPU),
    ]
    assert len({area.data_ptr() for area in areas}) == 4
    areas[2].fill_(7)
    assert not scratch.counters(8, CPU).any()
    assert scratch.counters(8, CPU).dtype == torch.int32
