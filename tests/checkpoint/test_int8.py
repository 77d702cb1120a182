"""Checkpoints with int8 weights: the same from every source, and refused where not asked for."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor

from blip3o_rt.checkpoint.convert import convert
from blip3o_rt.checkpoint.load import load_checkpoint
from blip3o_rt.checkpoint.manifest import Manifest
from blip3o_rt.checkpoint.parts import layouts, weight_bytes
from blip3o_rt.errors import CheckpointError, ParameterError
from blip3o_rt.measure.random_checkpoint import preset
from blip3o_rt.metadata import read_metadata
from blip3o_rt.pipeline import Pipeline
from blip3o_rt.weights import SCALE, row_scales, row_values

INT8 = {"ar_weights": "int8"}
BOTH = {"ar_weights": "int8", "dit_weights": "int8"}
MATRICES = {"ar": "layers.0.mlp.gate_up_proj.weight", "dit": "transformer_blocks.0.ff.conv_inverted.weight"}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("switch", "part"), [("ar_weights", "ar"), ("dit_weights", "dit")])
def test_every_source_gives_the_same(
    switch: str, part: str, dtype: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    switches = {switch: "int8"}
    monkeypatch.setattr("blip3o_rt.checkpoint.tensor_file.CHUNK_BYTES", 1000)  # no whole number of rows
    chosen = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    exact = convert(checkpoint, tmp_path / "exact", dtype=dtype, progress=False)
    int8 = convert(checkpoint, tmp_path / "int8", dtype=dtype, switches=switches, progress=False)
    assert (exact.switches, int8.switches) == ({}, switches)
    assert Manifest.read(tmp_path / "int8") == int8
    assert int8.files[f"{part}.safetensors"].size < 0.8 * exact.files[f"{part}.safetensors"].size
    others = exact.files.keys() - {f"{part}.safetensors"}
    assert all(int8.files[name] == exact.files[name] for name in others)
    sources = [
        load_checkpoint(checkpoint, dtype=chosen, switches=switches),
        load_checkpoint(checkpoint, dtype=chosen, switches=switches, cache_dir=tmp_path / "cache"),
        load_checkpoint(tmp_path / "exact", switches=switches),
        load_checkpoint(tmp_path / "int8", switches=switches, verify=True),
    ]
    names = {spec.name for spec in layouts(sources[0].config, switches)[part]}
    for found in sources:
        assert found.switches == switches
        assert found.weights[part].keys() == names
        for name, tensor in found.weights[part].items():
            assert torch.equal(tensor, sources[0].weights[part][name]), name
    plain = load_checkpoint(tmp_path / "exact").weights[part][MATRICES[part]]
    assert torch.equal(sources[0].weights[part][MATRICES[part]], row_values(plain))
    assert torch.equal(sources[0].weights[part][MATRICES[part] + SCALE], row_scales(plain))


def test_a_conversion_for_one_switch_serves_both(checkpoint: Path, tmp_path: Path) -> None:
    convert(checkpoint, tmp_path / "int8", dtype="fp32", switches=INT8, progress=False)
    found = load_checkpoint(tmp_path / "int8", switches=BOTH)
    direct = load_checkpoint(checkpoint, dtype=torch.float32, switches=BOTH)
    assert found.switches == direct.switches == BOTH
    for part in ("ar", "dit"):
        assert found.weights[part].keys() == direct.weights[part].keys()
        assert found.weights[part][MATRICES[part]].dtype == torch.int8


def test_int8_weights_are_refused_where_not_asked_for(checkpoint: Path, tmp_path: Path) -> None:
    convert(checkpoint, tmp_path / "int8", switches=INT8, progress=False)
    for load in (load_checkpoint, Pipeline.load):
        with pytest.raises(
            CheckpointError,
            match=r"converted with the switch ar_weights=int8.*accepted: tier 'fast' with that",
        ):
            load(tmp_path / "int8")
    with pytest.raises(ParameterError, match="there is no switch 'weights'"):
        convert(checkpoint, tmp_path / "other", switches={"weights": "int8"}, progress=False)


def test_int8_weights_of_the_transformer_are_refused_on_a_gpu(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blip3o_rt.pipeline.pipeline.resolve_device", torch.device)
    switches = {"dit_weights": "int8"}
    with pytest.raises(ParameterError, match="accepted is device 'cpu', or tier 'exact'"):
        Pipeline.load(checkpoint, device="cuda:0", dtype="fp32", tier="fast", switches=switches)
    with pytest.raises(ParameterError, match="accepted is device 'cpu', or tier 'exact'"):
        load_checkpoint(checkpoint, device="cuda", switches=switches)


def test_a_wide_matrix_is_dropped_as_soon_as_it_is_quantized(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(checkpoint, tmp_path / "exact", dtype="fp32", progress=False)
    seen: list[weakref.ref[Tensor]] = []
    held: list[int] = []

    def values(matrix: Tensor, dtype: torch.dtype) -> Tensor:
        seen.append(weakref.ref(matrix))
        held.append(sum(reference() is not None for reference in seen))
        return row_values(matrix, dtype)

    monkeypatch.setattr("blip3o_rt.weights.row_values", values)
    load_checkpoint(tmp_path / "exact", dtype=torch.bfloat16, switches=INT8)
    assert len(held) > 6
    assert max(held) <= 2  # this one and the one before it


def test_the_pipeline_says_what_it_ran(checkpoint: Path, tmp_path: Path) -> None:
    pipeline = Pipeline.load(checkpoint, device="cpu", tier="fast", switches=BOTH, max_batch=1)
    result = pipeline.generate("a red circle", steps=1)
    (path,) = result.save(tmp_path / "images")
    drawn = read_metadata(path)["parameters"]
    assert (drawn["tier"], drawn["switches"]) == ("fast", BOTH)
    report = result.report
    assert (report.tier, dict(report.switches)) == ("fast", BOTH)
    assert report.to_dict()["switches"] == BOTH
    assert "tier fast (ar_weights=int8, dit_weights=int8)" in str(report)
    assert {"row_linear_w8", "quantize_rows", "scale_product"} <= set(report.implementations)


def test_published_size() -> None:
    exact, int8 = (weight_bytes(preset("published"), torch.bfloat16, s)["ar"] for s in ({}, INT8))
    layers = 28 * (2048 * 4096 + 2048 * 2048 + 3 * 2048 * 6144)
    embedding = preset("published").ar.vocab_size * 2048
    assert exact == pytest.approx(2 * (layers + embedding), rel=1e-3)
    assert int8 == pytest.approx(
        layers + 3 * embedding, rel=2e-3
    )  # the head beside the embeddings it is tied to
    exact, int8 = (weight_bytes(preset("published"), torch.bfloat16, s)["dit"] for s in ({}, BOTH))
    assert exact - int8 == pytest.approx(20 * 2240 * (4 * 2240 + 2 * 2240 + 3 * 5600), rel=2e-3)
