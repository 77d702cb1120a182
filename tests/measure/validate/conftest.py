"""A tiny checkpoint, and implementations that are registered for one test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from blip3o_rt import ops
from blip3o_rt.measure.random_checkpoint import preset, write_random_checkpoint
from blip3o_rt.measure.validate.checkpoint import EDITING
from blip3o_rt.measure.validate.subject import Subject

Plant = Callable[..., None]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small run no faster on several threads, and a busy machine runs them slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random checkpoint that edits in both ways."""
    folder = tmp_path_factory.mktemp("validate") / "tiny"
    write_random_checkpoint(folder, preset("tiny", EDITING), seed=0)
    return folder


@pytest.fixture
def subject(tiny: Path) -> Subject:
    return Subject(tiny, torch.device("cpu"), tokens=24, steps=3)


@pytest.fixture
def plant() -> Iterator[Plant]:
    """plant(op_name, run, name="planted", **where) registers an implementation that comes first."""
    planted: list[tuple[str, str]] = []

    def register(op_name: str, run: Callable[..., Any], name: str = "planted", **where: Any) -> None:
        found = ops.all_ops()[op_name]
        found.implementation(name, device="cpu", **where)(run)
        planted.append((op_name, name))
        found.prefer(name)

    yield register
    for op_name, name in planted:
        ops.all_ops()[op_name].withdraw(name)
