"""What a model is taken to need is what its parts hold."""

from __future__ import annotations

from pathlib import Path

import torch

from blip3o_rt import admission
from blip3o_rt.checkpoint.load import load_checkpoint
from blip3o_rt.checkpoint.random_checkpoint import preset, write_random_checkpoint
from blip3o_rt.config import EditConfig
from blip3o_rt.graphs import Recorder
from blip3o_rt.pipeline import Pipeline
from tests.recorded_graph import RecordedGraphs


def test_recorded_conditions_are_counted(tmp_path: Path) -> None:
    model = preset("tiny", EditConfig(use_und_image_vae=True))
    write_random_checkpoint(tmp_path / "tiny", model, seed=1)
    checkpoint = load_checkpoint(tmp_path / "tiny", dtype=torch.float32)
    pipeline = Pipeline(checkpoint, recorder=Recorder(RecordedGraphs()))
    pipeline.prepare()
    conditions = [recorded._state.condition for recorded in pipeline._renderer._recorded.values()]
    assert len(conditions) == 2
    held = sum(condition.keys.numel() + condition.values.numel() for condition in conditions)
    assert admission._recorded_elements(checkpoint.config) == held


def test_tiles_take_less_until_attention_is_the_most() -> None:
    published = preset("published")
    held = [admission._picture_elements(published, tiles) for tiles in (1, 2, 4, 8)]
    assert held[0] == 3 * 1024 * 1024 * 128
    assert held[0] > 2 * held[1] > 2 * held[2] == 2 * held[3]
