"""Checkpoints with e4m3 weights: the same from every source, and for a GPU alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from blip3o_rt.checkpoint.convert import convert
from blip3o_rt.checkpoint.load import load_checkpoint
from blip3o_rt.checkpoint.parts import layouts
from blip3o_rt.errors import ParameterError
from blip3o_rt.ops.dtypes import E4M3
from blip3o_rt.weights import SCALE, row_scales, row_values

MATRICES = {
    "ar_weights": ("ar", "layers.0.mlp.gate_up_proj.weight"),
    "dit_weights": ("dit", "transformer_blocks.0.ff.conv_inverted.weight"),
}


@pytest.mark.parametrize("switch", MATRICES)
def test_every_source_gives_the_same(
    switch: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looked at on the CPU, which computes nothing with them."""
    switches, (part, matrix) = {switch: "fp8"}, MATRICES[switch]
    monkeypatch.setattr("blip3o_rt.checkpoint.load.check_device", lambda switches, device: None)
    monkeypatch.setattr("blip3o_rt.checkpoint.tensor_file.CHUNK_BYTES", 1000)  # no whole number of rows
    convert(checkpoint, tmp_path / "exact", dtype="bf16", progress=False)
    convert(checkpoint, tmp_path / "fp8", dtype="bf16", switches=switches, progress=False)
    sources = [
        load_checkpoint(checkpoint, dtype=torch.bfloat16, switches=switches),
        load_checkpoint(tmp_path / "exact", switches=switches),
        load_checkpoint(tmp_path / "fp8", switches=switches, verify=True),
    ]
    plain = load_checkpoint(tmp_path / "exact").weights[part][matrix]
    for found in (source.weights[part] for source in sources):
        assert found.keys() == {spec.name for spec in layouts(sources[0].config, switches)[part]}
        assert found[matrix].dtype == E4M3
        assert torch.equal(found[matrix].view(torch.uint8), row_values(plain, E4M3).view(torch.uint8))
        assert torch.equal(found[matrix + SCALE], row_scales(plain, E4M3))


@pytest.mark.parametrize("switch", MATRICES)
def test_a_cpu_is_refused(switch: str, checkpoint: Path) -> None:
    with pytest.raises(ParameterError, match=rf"{switch}=fp8 has no kernel for device 'cpu'.*device 'cuda'"):
        load_checkpoint(checkpoint, switches={switch: "fp8"})
