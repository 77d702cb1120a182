"""What a model is taken to need is what its parts hold."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from blip3o_rt.checkpoint.convert import convert
from blip3o_rt.checkpoint.load import load_checkpoint
from blip3o_rt.config import EditConfig
from blip3o_rt.graphs import GraphRunner
from blip3o_rt.measure.random_checkpoint import preset, write_random_checkpoint
from blip3o_rt.pipeline import Pipeline, memory
from blip3o_rt.precision import BF16, FP32, MIXED, Precision
from tests.captured_graph import CapturedGraphs


@pytest.mark.parametrize(
    ("edit", "geometries"),
    [
        (EditConfig(use_und_image_vae=True), 2),
        (EditConfig(use_und_image_vae_as_noise=True), 2),
        (EditConfig(), 1),  # an edit sees its reference in the tokens alone, and is drawn as words are
    ],
)
def test_recorded_images_are_counted(tmp_path: Path, edit: EditConfig, geometries: int) -> None:
    write_random_checkpoint(tmp_path / "tiny", preset("tiny", edit), seed=1)
    checkpoint = load_checkpoint(tmp_path / "tiny", dtype=torch.bfloat16)
    pipeline = Pipeline(checkpoint, runner=GraphRunner(CapturedGraphs()))
    pipeline.warm_up()
    states = [captured.images[0].state for captured in pipeline._renderer._captured.values()]
    assert len(states) == geometries
    held = [state.condition.keys for state in states] + [state.condition.values for state in states]
    held += [state.tables.blocks for state in states] + [state.tables.final for state in states]
    assert memory._captured_bytes(checkpoint.config, torch.bfloat16) == sum(t.nbytes for t in held)


def test_without_graphs_nothing_is_held_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model, needed = preset("published"), []
    monkeypatch.setattr(memory, "require_memory", lambda found, *_: needed.append(found))
    for graphs in ("on", "off"):
        monkeypatch.setenv("BLIP3O_GRAPHS", graphs)
        memory.require_model_memory(model, BF16, {}, torch.device("cuda"), 1, 1536)
    assert needed[0] - needed[1] == memory._captured_bytes(model, torch.bfloat16) > 0


def test_tiles_take_less_until_attention_is_the_most() -> None:
    published = preset("published")
    held = [memory._activation_elements(published, tiles) for tiles in (1, 2, 4, 8)]
    assert held[0] == 3 * 1024 * 1024 * 128
    assert held[0] > 2 * held[1] > 2 * held[2] == 2 * held[3]


def test_positions_that_cannot_be_used_are_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model, needed = preset("tiny"), []
    monkeypatch.setattr(memory, "require_memory", lambda found, *_: needed.append(found))
    usable = model.ar.max_position_embeddings - model.image_tokens.tokens_per_image
    for longest in (usable, 1_000_000):
        memory.require_model_memory(model, FP32, {}, torch.device("cpu"), 4, longest)
    assert needed[0] == needed[1]


@pytest.mark.parametrize(
    ("precision", "max_batch", "remedy"),
    [
        (FP32, 1, "choose dtype bf16, or"),
        (MIXED, 1, "choose tier fast with 8-bit weights, or"),
        (BF16, 1, "choose tier fast with 8-bit weights, or"),
        (BF16, 256, "choose a smaller max_batch (256) or max_prompt_tokens (1536), or"),
    ],
)
def test_the_remedy_names_what_takes_the_memory(
    monkeypatch: pytest.MonkeyPatch, precision: Precision, max_batch: int, remedy: str
) -> None:
    said = []
    monkeypatch.setattr(memory, "require_memory", lambda *arguments: said.append(arguments[-1]))
    memory.require_model_memory(preset("published"), precision, {}, torch.device("cpu"), max_batch, 1536)
    assert said[0].startswith(remedy)


def test_mixed_takes_at_most_60_percent_of_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    model, needed = preset("published"), []
    monkeypatch.setattr(memory, "require_memory", lambda found, *_: needed.append(found))
    for precision in (FP32, MIXED):
        memory.require_model_memory(model, precision, {}, torch.device("cpu"), 1, 1536)
    assert needed[1] <= 0.6 * needed[0]


WATCHED = """
import re, sys, threading, time
from pathlib import Path

import blip3o_rt, transformers
from blip3o_rt import Pipeline

def anonymous():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def watch():
    while True:
        most[0] = max(most[0], anonymous())
        time.sleep(0.002)

before = anonymous()
most = [before]
threading.Thread(target=watch, daemon=True).start()
pipe = Pipeline.load(sys.argv[1], dtype=sys.argv[2], max_batch=1)
pipe.generate("a red circle", steps=1, progress=False)
print(most[0] - before)
"""


@pytest.mark.exhaustive
def test_mixed_maps_weights_and_does_not_copy_them(tmp_path: Path) -> None:
    """Anonymous memory, which the system cannot drop, at its peak; pages of a mapped file are none."""
    tiny = preset("tiny")
    wide = replace(tiny, ar=replace(tiny.ar, hidden_size=1024, intermediate_size=4096, num_layers=12))
    write_random_checkpoint(tmp_path / "wide", wide, dtype="bf16")
    convert(tmp_path / "wide", tmp_path / "converted", dtype="bf16", progress=False)
    weights = sum(path.stat().st_size for path in (tmp_path / "converted").glob("*.safetensors"))
    assert weights > 2**28

    def peak(dtype: str) -> int:
        command = [sys.executable, "-c", WATCHED, str(tmp_path / "converted"), dtype]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert peak("mixed") < weights / 3
    assert peak("fp32") > 2 * weights
