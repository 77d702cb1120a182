"""The baselines' weights are the published checkpoint's own, in the runtime's memory where that can be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from blip3o_rt.checkpoint.load import Checkpoint, load_checkpoint
from blip3o_rt.checkpoint.parts import layouts, published_name
from blip3o_rt.measure.bench import baseline_modules
from blip3o_rt.measure.bench.baseline_modules import original_tensors
from blip3o_rt.measure.random_checkpoint import preset, write_random_checkpoint


@pytest.mark.parametrize("part", ["ar", "connector", "dit", "vae", "ta_tok"])
def test_original_tensors_are_those_of_the_published_file(part: str, tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "published", "tiny", dtype="fp32")
    published = load_file(tmp_path / "published" / "model.safetensors")
    checkpoint = load_checkpoint(tmp_path / "published", dtype=torch.float32, parts=[part])
    specs = layouts(checkpoint.config)[part]
    found = original_tensors(specs, checkpoint.weights[part])
    computed = {source.name for spec in specs if spec.dtype is not None for source in spec.sources}
    assert set(found) == {source.name for spec in specs for source in spec.sources} - computed
    for name, tensor in found.items():
        assert torch.equal(tensor, published[published_name(part, name)])
        assert tensor.is_contiguous()


def storages(tensors: dict[str, torch.Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}


@pytest.mark.parametrize("part", ["ar", "dit"])
def test_a_baseline_of_a_large_part_takes_no_memory_of_its_own(part: str, checkpoint: Checkpoint) -> None:
    config, weights = checkpoint.config, checkpoint.weights[part]
    module = (
        baseline_modules.language_model(config.ar, weights)
        if part == "ar"
        else baseline_modules.transformer(config.dit, weights)
    )
    assert storages(dict(module.named_parameters())) <= storages(weights)
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    tiny = preset("tiny")
    tied = replace(tiny, ar=replace(tiny.ar, tie_word_embeddings=True))
    config = write_random_checkpoint(tmp_path / "tied", tied)
    weights = load_checkpoint(tmp_path / "tied", parts=["ar"]).weights["ar"]
    module = baseline_modules.language_model(config.ar, weights)
    assert module.lm_head.weight.data_ptr() == module.model.embed_tokens.weight.data_ptr()


def test_a_missing_package_is_said_with_its_remedy() -> None:
    assert baseline_modules.missing_package("torch") is None
    reason = baseline_modules.missing_package("no_such_package")
    assert reason is not None
    assert reason.endswith("pip install 'blip3o_rt[bench]'")
