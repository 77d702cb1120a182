"""LoRA adapters merged by `convert`, against the product in float64; and those that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from blip3o_rt.checkpoint.convert import convert
from blip3o_rt.checkpoint.load import load_checkpoint
from blip3o_rt.errors import CheckpointError, ConfigError, ParameterError

from .conftest import edit_json

TARGETS = ("model.layers.1.self_attn.o_proj", "model.sana.transformer_blocks.0.ff.conv_point")


@pytest.fixture
def adapter(checkpoint: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    base, factors = load_file(checkpoint / "model.safetensors"), {}
    for target in TARGETS:
        shape = base[f"{target}.weight"].shape
        tail = shape[2:]
        prefix = f"base_model.model.{target}.lora_"
        factors[f"{prefix}A.weight"] = torch.randn(4, shape[1], *tail, generator=generator)
        factors[f"{prefix}B.weight"] = torch.randn(shape[0], 4, *tail, generator=generator)
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "use_dora": False}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def merged(checkpoint: Path, adapter: Path, target: str, factor: float) -> Tensor:
    base = load_file(checkpoint / "model.safetensors")[f"{target}.weight"].double().flatten(1)
    factors = load_file(adapter / "adapter_model.safetensors")
    down, up = (factors[f"base_model.model.{target}.lora_{side}.weight"].double().flatten(1) for side in "AB")
    return base + factor * up @ down


@pytest.mark.parametrize(
    ("scale", "rslora", "factor"), [(1.0, False, 2.0), (0.5, False, 1.0), (1.0, True, 4.0)]
)
def test_an_adapter_is_merged_in_float32(
    scale: float,
    rslora: bool,
    factor: float,
    checkpoint: Path,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sums of four products in float32: within 1e-6 of values of a few units. Pieces hold no whole rows."""
    monkeypatch.setattr("blip3o_rt.checkpoint.tensor_file.CHUNK_BYTES", 1000)
    edit_json(adapter / "adapter_config.json", {"use_rslora": rslora})
    plain = load_checkpoint(checkpoint, dtype=torch.float32).weights
    manifest = convert(
        checkpoint, tmp_path / "out", dtype="fp32", lora=adapter, lora_scale=scale, progress=False
    )
    weights = load_checkpoint(tmp_path / "out").weights
    for part, name, target in (
        ("ar", "layers.1.self_attn.o_proj.weight", TARGETS[0]),
        ("dit", "transformer_blocks.0.ff.conv_point.weight", TARGETS[1]),
    ):
        expected = merged(checkpoint, adapter, target, factor)
        torch.testing.assert_close(weights[part][name].double(), expected, rtol=1e-6, atol=1e-5)
        plain[part].pop(name)
    for part, tensors in plain.items():
        assert all(torch.equal(tensor, weights[part][name]) for name, tensor in tensors.items())
    assert any("adapter_model.safetensors" in name for name in manifest.sources)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; accepted: 'LORA'"),
        ({"use_dora": True}, "use_dora is True; accepted: false"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"alpha_pattern": {"o_proj": 2}}, "alpha_pattern"),
        ({"r": 0}, "r is 0"),
    ],
)
def test_other_adapters_are_refused(
    change: dict[str, Any], message: str, checkpoint: Path, adapter: Path, tmp_path: Path
) -> None:
    edit_json(adapter / "adapter_config.json", change)
    with pytest.raises(ConfigError, match=message):
        convert(checkpoint, tmp_path / "out", lora=adapter, progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("base_model.model.model.layers.9.mlp.up_proj.lora_A.weight", (4, 64), "has no matrix in"),
        ("base_model.model.model.norm.lora_A.weight", (4, 64), "one factor only"),
        ("base_model.model.lm_head.weight", (4, 64), "is not merged"),
        (f"base_model.model.{TARGETS[0]}.lora_A.weight", (4, 63), r"\[4, 63\]; accepted: .*\[4, 128\]"),
    ],
)
def test_factors_that_do_not_fit_are_named(
    name: str, shape: tuple[int, ...], message: str, checkpoint: Path, adapter: Path, tmp_path: Path
) -> None:
    factors = load_file(adapter / "adapter_model.safetensors")
    save_file({**factors, name: torch.zeros(shape)}, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        convert(checkpoint, tmp_path / "out", lora=adapter, progress=False)


def test_a_scale_that_is_no_number_is_refused(checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="lora_scale is nan; accepted: a finite number"):
        convert(checkpoint, tmp_path / "out", lora=adapter, lora_scale=float("nan"), progress=False)
