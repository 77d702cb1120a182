"""Loading: mapping, dtypes, verification, the cache, and damaged conversions."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from blip3o_rt.ar import layout as ar
from blip3o_rt.checkpoint.convert import convert
from blip3o_rt.checkpoint.load import load_checkpoint, open_checkpoint
from blip3o_rt.checkpoint.manifest import MANIFEST
from blip3o_rt.checkpoint.parts import layout_fingerprint
from blip3o_rt.checkpoint.source import Source
from blip3o_rt.config import ARConfig, ModelConfig
from blip3o_rt.errors import CheckpointError
from blip3o_rt.precision import MIXED
from blip3o_rt.weights import TensorSpec

from .conftest import edit_json, edit_tensors


@pytest.fixture
def converted(checkpoint: Path, tmp_path: Path) -> Path:
    convert(checkpoint, tmp_path / "converted", progress=False)
    return tmp_path / "converted"


def test_a_conversion_is_mapped(converted: Path) -> None:
    loaded = load_checkpoint(converted)
    assert loaded.tokenizer_dir == converted / "tokenizer"
    assert loaded.device == torch.device("cpu")
    assert loaded.source == converted
    mapped = Path("/proc/self/maps")
    if mapped.exists():
        maps = mapped.read_text()
        assert all(f"{converted / part}.safetensors" in maps for part in loaded.weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_asked_dtype_is_given(dtype: torch.dtype, checkpoint: Path, converted: Path) -> None:
    for path in (checkpoint, converted):
        loaded = load_checkpoint(path, dtype=dtype)
        assert loaded.dtype == dtype
        kept = {"codebook": torch.float32}
        for tensors in loaded.weights.values():
            assert all(tensor.dtype == kept.get(name, dtype) for name, tensor in tensors.items())


def test_mixed_maps_the_matrices_and_widens_the_rest(checkpoint: Path, converted: Path) -> None:
    stored = load_checkpoint(converted)
    for path in (checkpoint, converted):
        loaded = load_checkpoint(path, dtype=MIXED)
        assert (loaded.dtype, loaded.precision) == (torch.float32, MIXED)
        for part, tensors in loaded.weights.items():
            for name, tensor in tensors.items():
                kept = torch.bfloat16 if tensor.dim() == 2 and name != "codebook" else torch.float32
                assert tensor.dtype == kept, name
                assert torch.equal(tensor.float(), stored.weights[part][name].float())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mappings")
def test_mixed_copies_no_matrix(converted: Path) -> None:
    loaded = load_checkpoint(converted, dtype=MIXED)
    ranges = [
        [int(end, 16) for end in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if str(converted) in line
    ]
    kept = [t for tensors in loaded.weights.values() for t in tensors.values() if t.dtype == torch.bfloat16]
    assert kept
    assert all(any(first <= t.data_ptr() < last for first, last in ranges) for t in kept)


def test_only_the_parts_asked_for_are_read(checkpoint: Path, converted: Path) -> None:
    for path in (checkpoint, converted):
        whole = load_checkpoint(path)
        loaded = load_checkpoint(path, parts=("vae", "connector"))
        assert set(loaded.weights) == {"vae", "connector"}
        assert loaded.config == whole.config
        assert set(loaded.weights["vae"]) == set(whole.weights["vae"])


def test_another_dtype_is_refused(checkpoint: Path, converted: Path) -> None:
    for path in (checkpoint, converted):
        with pytest.raises(
            CheckpointError, match=r"cannot be held as torch\.float16; accepted: bf16 or fp32"
        ):
            load_checkpoint(path, dtype=torch.float16)


def test_a_model_can_be_refused_before_it_is_read(checkpoint: Path, converted: Path) -> None:
    """Opening reads no weight: a file whose values cannot be used still opens."""
    edit_tensors(
        checkpoint / "model.safetensors", lambda tensors: tensors["model.norm.weight"].fill_(float("nan"))
    )
    (converted / "ar.safetensors").unlink()
    for path in (checkpoint, converted):
        opened = open_checkpoint(path)
        assert (opened.config.ar.num_layers, opened.stored_dtype) == (2, torch.bfloat16)
        with pytest.raises(CheckpointError, match=r"NaN|missing"):
            opened.load()


def flip_last_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_changed_content_is_found_by_verifying(converted: Path) -> None:
    flip_last_bit(converted / "dit.safetensors")
    load_checkpoint(converted)
    with pytest.raises(CheckpointError, match=r"dit\.safetensors: checksum mismatch"):
        load_checkpoint(converted, verify=True)


def test_a_changed_tokenizer_is_found_by_verifying(converted: Path) -> None:
    flip_last_bit(converted / "tokenizer" / "tokenizer.json")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: checksum mismatch"):
        load_checkpoint(converted, verify=True)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize("name", ["ar.safetensors", "vae.safetensors", "tokenizer/tokenizer.json"])
@pytest.mark.parametrize(
    ("damage", "message"), [(truncate, "bytes, the manifest says"), (os.unlink, "missing")]
)
def test_truncated_and_missing_files_are_always_found(
    name: str, damage: Callable[[Path], None], message: str, converted: Path
) -> None:
    damage(converted / name)
    with pytest.raises(CheckpointError, match=message) as refusal:
        load_checkpoint(converted)
    assert name in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format version 2; accepted: 1"),
        ({"format": "other"}, "not a manifest"),
        ({"dtype": "int4"}, "damaged"),
        ({"files": {"../../etc/passwd": {"size": 1, "sha256": ""}}}, "damaged"),
        ({"files": None}, "damaged"),
        ({"surprise": 1}, "damaged"),
        ({"config": {}}, "damaged"),
    ],
)
def test_a_damaged_manifest_is_refused(change: dict[str, object], message: str, converted: Path) -> None:
    edit_json(converted / MANIFEST, change)
    with pytest.raises(CheckpointError, match=message) as refusal:
        load_checkpoint(converted)
    assert "\n" not in str(refusal.value)


def test_a_manifest_of_another_geometry_is_refused(converted: Path) -> None:
    config = json.loads((converted / MANIFEST).read_text())["config"]
    for key, value, message in (("intermediate_size", 64, "has shape"), ("num_layers", 3, r"layers\.2")):
        changed = {**config, "ar": {**config["ar"], key: value}}
        layout = layout_fingerprint(ModelConfig.from_dict(changed))
        edit_json(converted / MANIFEST, {"config": changed, "layout": layout})
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(converted)


def test_another_arrangement_of_the_same_shapes_is_refused(
    converted: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = load_checkpoint(checkpoint, cache_dir=tmp_path / "cache").source

    def interleaved(config: ARConfig, *, values: torch.dtype | None) -> list[TensorSpec]:
        return [
            replace(spec, sources=spec.sources[::-1]) if spec.name.endswith("gate_up_proj.weight") else spec
            for spec in given(config, values=values)
        ]

    given = ar.layout
    monkeypatch.setattr(ar, "layout", interleaved)
    with pytest.raises(
        CheckpointError, match="arranged tensors in another way; convert the checkpoint again"
    ):
        load_checkpoint(converted)
    assert load_checkpoint(checkpoint, cache_dir=tmp_path / "cache").source != cached


def test_folders_are_refused_with_a_conversion(converted: Path, checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="takes no diffusion folder"):
        load_checkpoint(Source(converted, diffusion=checkpoint / "sana"))


def test_the_cache_is_made_once_and_again_when_the_source_changes(checkpoint: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = load_checkpoint(checkpoint, cache_dir=cache)
    made = list(cache.iterdir())
    assert [first.source] == made
    inode = (made[0] / MANIFEST).stat().st_ino
    again = load_checkpoint(checkpoint, cache_dir=cache)
    assert again.source == first.source
    assert (made[0] / MANIFEST).stat().st_ino == inode
    direct = load_checkpoint(checkpoint)
    for part, tensors in direct.weights.items():
        assert all(torch.equal(tensor, again.weights[part][name]) for name, tensor in tensors.items())
    load_checkpoint(checkpoint, cache_dir=cache, dtype=torch.float32)
    assert len(list(cache.iterdir())) == 2
    os.utime(checkpoint / "model.safetensors", ns=(0, 0))
    assert load_checkpoint(checkpoint, cache_dir=cache).source != first.source


@pytest.mark.parametrize("layout", ["published", "cached", "converted"])
def test_loading_warns_once_of_what_is_left_out(
    layout: str, checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    edit_tensors(
        checkpoint / "model.safetensors", lambda tensors: tensors.update({"model.new.bias": torch.zeros(2)})
    )
    path, cache = checkpoint, tmp_path / "cache" if layout == "cached" else None
    if layout == "converted":
        path = tmp_path / "converted"
        convert(checkpoint, path, progress=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_checkpoint(path, cache_dir=cache)
    assert [str(warning.message) for warning in caught] == ["model.new.bias is not known and was left out"]
    assert caught[0].filename == __file__
    assert capfd.readouterr() == ("", "")  # no progress bar either


def test_packed_tensors_are_in_the_order_their_names_say(checkpoint: Path) -> None:
    published = load_file(checkpoint / "model.safetensors")
    weights = load_checkpoint(checkpoint).weights

    def joined(prefix: str, *names: str) -> torch.Tensor:
        return torch.cat([published[prefix + name] for name in names])

    layer, block = "model.layers.1.", "model.sana.transformer_blocks.1."
    tower = "model.vision_tower.vision_tower.encoder.encoder.layers.1.self_attn."
    query_key_value = ("q_proj.weight", "k_proj.weight", "v_proj.weight")
    expected = {
        ("ar", "layers.1.self_attn.qkv_proj.weight"): joined(layer + "self_attn.", *query_key_value),
        ("ar", "layers.1.mlp.gate_up_proj.weight"): joined(
            layer + "mlp.", "gate_proj.weight", "up_proj.weight"
        ),
        ("dit", "transformer_blocks.1.attn1.to_qkv.weight"): joined(
            block + "attn1.", "to_q.weight", "to_k.weight", "to_v.weight"
        ),
        ("dit", "transformer_blocks.1.attn2.to_kv.bias"): joined(block + "attn2.", "to_k.bias", "to_v.bias"),
        ("dit", "transformer_blocks.1.ff.conv_point.weight"): published[block + "ff.conv_point.weight"][
            :, :, 0, 0
        ],
        ("ta_tok", "encoder.encoder.layers.1.self_attn.qkv_proj.weight"): joined(tower, *query_key_value),
    }
    for (part, name), tensor in expected.items():
        assert torch.equal(weights[part][name], tensor), name
