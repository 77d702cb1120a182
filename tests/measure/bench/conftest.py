"""A tiny random checkpoint, in float32, for all tests of the bench."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from blip3o_rt.checkpoint.load import Checkpoint
from blip3o_rt.measure.bench.subject import Subject, prepare


@pytest.fixture(scope="session")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    work: Path = tmp_path_factory.mktemp("bench")
    return prepare("tiny", torch.float32, torch.device("cpu"), work)


@pytest.fixture(scope="session")
def checkpoint(subject: Subject) -> Checkpoint:
    return subject.load()
