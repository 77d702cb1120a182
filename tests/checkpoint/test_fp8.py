"""Checkpoints with e4m3 weights: the same from every source, and for a GPU alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from blip3o_rt.checkpoint.convert import convert
from blip3o_rt.checkpoint.load import load_checkpoint
from blip3o_rt.errors import ParameterError
from blip3o_rt.quantisation import E4M3, SCALE, row_scales, row_values

FP8 = {"dit_weights": "fp8"}
MATRIX = "transformer_blocks.0.ff.conv_inverted.weight"


def test_every_source_gives_the_same(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looked at on the CPU, which computes nothing with them."""
    monkeypatch.setattr("blip3o_rt.checkpoint.load.check_device", lambda switches, device: None)
    monkeypatch.setattr("blip3o_rt.checkpoint.tensor_file.CHUNK_BYTES", 1000)  # no whole number of rows
    convert(checkpoint, tmp_path / "exact", dtype="bf16", progress=False)
    convert(checkpoint, tmp_path / "fp8", dtype="bf16", switches=FP8, progress=False)
    sources = [
        load_checkpoint(checkpoint, dtype=torch.bfloat16, switches=FP8),
        load_checkpoint(tmp_path / "exact", switches=FP8),
        load_checkpoint(tmp_path / "fp8", switches=FP8, verify=True),
    ]
    plain = load_checkpoint(tmp_path / "exact").weights["dit"][MATRIX]
    for found in (source.weights["dit"] for source in sources):
        assert found.keys() == sources[0].weights["dit"].keys()
        assert found[MATRIX].dtype == E4M3
        assert torch.equal(found[MATRIX].view(torch.uint8), row_values(plain, E4M3).view(torch.uint8))
        assert torch.equal(found[MATRIX + SCALE], row_scales(plain, E4M3))


def test_a_cpu_is_refused(checkpoint: Path) -> None:
    with pytest.raises(
        ParameterError, match=r"dit_weights=fp8 has no kernel for device 'cpu'.*device 'cuda'"
    ):
        load_checkpoint(checkpoint, switches=FP8)
