"""What a checkpoint holds beside what its configuration needs: contradictions, leftovers, wrapped names."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from blip3o_rt.checkpoint.load import load_checkpoint
from blip3o_rt.errors import CheckpointError

from .conftest import edit_json, edit_tensors

MODEL = "model.safetensors"
TOWER = "model.vision_tower.vision_tower."


def add(checkpoint: Path, name: str, tensor: Tensor | None = None) -> None:
    extra = torch.ones(2) if tensor is None else tensor
    edit_tensors(checkpoint / MODEL, lambda tensors: tensors.update({name: extra}))


def rename(checkpoint: Path, new_name: Callable[[str], str]) -> None:
    tensors = load_file(checkpoint / MODEL)
    save_file({new_name(name): tensor for name, tensor in tensors.items()}, checkpoint / MODEL)


def assert_same(one: Path, other: dict[str, dict[str, Tensor]]) -> None:
    weights = load_checkpoint(one).weights
    assert weights.keys() == other.keys()
    for part, tensors in other.items():
        assert all(torch.equal(tensor, weights[part][name]) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("model.layers.0.self_attn.q_proj.bias", "attention_bias is false in .*config.json"),
        ("model.sana.transformer_blocks.0.attn1.to_q.bias", "attention_bias is false in .*config.json"),
        ("model.layers.2.mlp.up_proj.weight", "num_hidden_layers is 2"),
        ("model.sana.transformer_blocks.2.ff.conv_point.weight", "num_layers is 2"),
        (TOWER + "encoder.encoder.layers.3.mlp.fc1.bias", "num_hidden_layers of its vision tower is 3"),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", "an adapter is merged"),
        ("model.layers.1.self_attn.q_proj.base_layer.weight", "an adapter is merged"),
        ("model.layers.1.self_attn.q_proj.lora_magnitude_vector", "an adapter is merged"),
        ("model.layers.1.self_attn.q_proj.hada_w1_a", "an adapter is merged"),
        ("lora_unet_transformer_blocks_0_attn1_to_q.lora_down.weight", "an adapter is merged"),
        ("model.norm.bias", "asks for none such"),
        ("lm_head.bias", "asks for none such"),
        ("model.layers.1.mlp.down_proj.bias", "asks for none such"),
        ("model.sana_vae.decoder.up_blocks.0.9.conv1.conv.weight", ""),
        ("model.layers.1.post_mlp_layernorm.weight", "asks for none such"),
        ("model.sana_vae.decoder.conv_out.weight_scale", "asks for none such"),
    ],
)
def test_a_tensor_that_contradicts_the_configuration_is_refused(
    name: str, reason: str, checkpoint: Path
) -> None:
    add(checkpoint, name)
    with pytest.raises(
        CheckpointError, match=f"{name}' would change what is computed, but .*{reason}"
    ) as found:
        load_checkpoint(checkpoint)
    assert "\n" not in str(found.value)


def test_what_training_left_is_one_warning(checkpoint: Path) -> None:
    before = load_checkpoint(checkpoint).weights

    def train(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.")]:
            tensors[f"ema.{name}"] = tensors[name].clone()
            tensors[f"{name}.exp_avg"] = tensors[name].clone()
            tensors[f"{name}.momentum_buffer"] = tensors[name].clone()
        tensors["optimizer.state.0.step"] = torch.ones(())
        tensors["swa.n_averaged"] = torch.ones(())
        tensors["lr_scheduler.last_epoch"] = torch.ones(())

    edit_tensors(checkpoint / MODEL, train)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_same(checkpoint, before)
    assert len(caught) == 1
    left = re.compile(r"ema|optim|swa|lr_scheduler|.*(exp_avg|momentum_buffer)")
    count = sum(left.match(name) is not None for name in load_file(checkpoint / MODEL))
    assert str(caught[0].message).startswith(f"{count} tensors are not known and were left out")


WRAPPERS = ["_orig_mod.", "module.", "base_model.model.", "_fsdp_wrapped_module.", "module._orig_mod."]
WRAPPERS += ["model.", "_forward_module.", "module.module.", "student.", "_orig_mod.base_model.model.module."]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapper_around_every_name_is_taken_off(wrapper: str, checkpoint: Path) -> None:
    before = load_checkpoint(checkpoint).weights
    rename(checkpoint, lambda name: wrapper + name)
    assert_same(checkpoint, before)


@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod."])
def test_names_may_lack_the_outer_model(wrapper: str, checkpoint: Path) -> None:
    before = load_checkpoint(checkpoint).weights
    rename(checkpoint, lambda name: wrapper + name.removeprefix("model."))
    assert_same(checkpoint, before)


@pytest.mark.parametrize(
    ("place", "wrapper"),
    [
        ("model.", "_orig_mod."),
        ("model.", "module."),
        ("model.sana.", "_orig_mod."),
        ("model.layers.0.", "_fsdp_wrapped_module."),
        ("model.layers.1.", "_checkpoint_wrapped_module."),
        (TOWER, "_orig_mod.module."),
    ],
)
def test_a_wrapper_around_a_part_of_the_model_is_taken_off(
    place: str, wrapper: str, checkpoint: Path
) -> None:
    before = load_checkpoint(checkpoint).weights
    rename(checkpoint, lambda name: re.sub(f"^{re.escape(place)}", place + wrapper, name))
    assert_same(checkpoint, before)


def test_a_tensor_with_and_without_its_wrapper_is_refused(checkpoint: Path) -> None:
    add(checkpoint, "model._orig_mod.norm.weight")
    with pytest.raises(CheckpointError, match=r"'model\.(_orig_mod\.)?norm\.weight' are one tensor"):
        load_checkpoint(checkpoint)


def test_a_wrapper_in_the_diffusers_folder_is_taken_off(checkpoint: Path) -> None:
    before = load_checkpoint(checkpoint).weights
    tensors, vae = load_file(checkpoint / MODEL), "model.sana_vae."
    stock = {f"module.{name.removeprefix(vae)}": t for name, t in tensors.items() if name.startswith(vae)}
    save_file(stock, checkpoint / "sana" / "vae" / "diffusion_pytorch_model.safetensors")
    save_file({name: t for name, t in tensors.items() if not name.startswith(vae)}, checkpoint / MODEL)
    assert_same(checkpoint, before)


def test_a_wrapper_around_some_names_is_named(checkpoint: Path) -> None:
    rename(checkpoint, lambda name: name if name == "model.norm.weight" else f"module.{name}")
    with pytest.raises(CheckpointError, match=r"begin with 'module\.' but 'model\.norm\.weight' does not"):
        load_checkpoint(checkpoint)
    rename(checkpoint, lambda name: name.removeprefix("module."))
    rename(checkpoint, lambda name: f"module.{name}" if name == "model.norm.weight" else name)
    with pytest.raises(CheckpointError, match=r"'module\.model\.norm\.weight'"):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "base_model.model."])
@pytest.mark.parametrize("of", ["model.vision_tower.", "model.sana.", "model.layers.1."])
def test_a_wrapper_around_a_part_of_the_names_is_named(wrapper: str, of: str, checkpoint: Path) -> None:
    rename(checkpoint, lambda name: wrapper + name if name.startswith(of) else name)
    message = (
        f"names as '{re.escape(wrapper + of)}.*' begin with '{re.escape(wrapper)}' but 'model.embed_tokens"
    )
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.gguf", r"only model\.gguf"),
        ("consolidated.safetensors", r"only consolidated\.safetensors"),
        ("model.safetensors.incomplete", r"model\.safetensors\.incomplete is an unfinished download"),
        ("pytorch_model.bin", r"pytorch_model\.bin is a pickle"),
    ],
)
def test_weights_under_another_name_are_named(name: str, said: str, checkpoint: Path) -> None:
    (checkpoint / MODEL).rename(checkpoint / name)
    with pytest.raises(CheckpointError, match=f"no weights.*{said}.*accepted: model.safetensors"):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.module.", "model.", "vision_tower."])
def test_a_wrapper_in_ta_tok_is_taken_off(wrapper: str, checkpoint: Path) -> None:
    before = load_checkpoint(checkpoint).weights
    tensors = load_file(checkpoint / MODEL)
    state = {wrapper + name.removeprefix(TOWER): t for name, t in tensors.items() if name.startswith(TOWER)}
    save_file({name: t for name, t in tensors.items() if not name.startswith(TOWER)}, checkpoint / MODEL)
    bottleneck = {"bottleneck_dim": 32, "regularizer": {"name": "simvq", "args": {"codebook_size": 256}}}
    bottleneck["regularizer"]["args"]["l2_normalized"] = True  # type: ignore[index]
    arguments = {"bottleneck": {"args": bottleneck}, "teacher": "siglip2", "input_size": 64}
    torch.save({"model": {"args": arguments, "sd": state}}, checkpoint / "ta_tok.pth")
    assert_same(checkpoint, before)


def sharded(checkpoint: Path) -> tuple[Path, Path]:
    tensors = load_file(checkpoint / MODEL)
    (checkpoint / MODEL).unlink()
    shards = checkpoint / "model-00001-of-00002.safetensors", checkpoint / "model-00002-of-00002.safetensors"
    for shard, sana in zip(shards, (False, True), strict=True):
        save_file({n: t for n, t in tensors.items() if n.startswith("model.sana.") == sana}, shard)
    return shards


@pytest.mark.parametrize("lost", [0, 1])
def test_a_shard_that_is_lost_is_named(lost: int, checkpoint: Path) -> None:
    sharded(checkpoint)[lost].unlink()
    with pytest.raises(
        CheckpointError, match=f"shard {lost + 1} of 2 is missing beside model-0000{2 - lost}-of"
    ):
        load_checkpoint(checkpoint)


def test_the_trained_transformer_is_not_replaced_silently(checkpoint: Path) -> None:
    """The untrained weights of the diffusers folder have the same names and shapes."""
    tensors = load_file(checkpoint / MODEL)
    stock = {n.removeprefix("model.sana."): t * 2 for n, t in tensors.items() if n.startswith("model.sana.")}
    save_file(stock, checkpoint / "sana" / "transformer" / "diffusion_pytorch_model.safetensors")
    save_file({n: t for n, t in tensors.items() if not n.startswith("model.sana.")}, checkpoint / MODEL)
    with pytest.raises(CheckpointError, match=r"no tensors under model\.sana\., the trained diffusion"):
        load_checkpoint(checkpoint)


def test_an_index_beside_a_whole_file_is_named(checkpoint: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        CheckpointError, match=r"index\.json: lists other files beside a whole model\.safetensors"
    ):
        load_checkpoint(checkpoint)


def variant(checkpoint: Path) -> dict[str, Tensor]:
    """Other weights, twice the plain ones, as a variant with an index."""
    tensors = {name: tensor * 2 for name, tensor in load_file(checkpoint / MODEL).items()}
    shard = "model.fp16-00001-of-00001.safetensors"
    save_file(tensors, checkpoint / shard)
    index = {"weight_map": dict.fromkeys(tensors, shard)}
    (checkpoint / "model.fp16.safetensors.index.json").write_text(json.dumps(index))
    return tensors


def test_plain_weights_are_read_beside_a_variant(checkpoint: Path) -> None:
    before = load_checkpoint(checkpoint).weights
    variant(checkpoint)
    assert_same(checkpoint, before)


def test_a_variant_is_read_where_it_is_asked_for(checkpoint: Path) -> None:
    from blip3o_rt.checkpoint.source import Source

    expected = variant(checkpoint)["model.norm.weight"]
    (checkpoint / MODEL).unlink()
    with pytest.raises(CheckpointError, match=r"no weights but those of variant fp16 .*--variant fp16"):
        load_checkpoint(checkpoint)
    found = load_checkpoint(Source(checkpoint, variant="fp16")).weights["ar"]["norm.weight"]
    assert torch.equal(found, expected)
    (checkpoint / "model.fp16.safetensors.index.json").unlink()  # the shards are a complete numbered set
    found = load_checkpoint(Source(checkpoint, variant="fp16")).weights["ar"]["norm.weight"]
    assert torch.equal(found, expected)


def test_an_adapter_alone_is_refused_with_advice(checkpoint: Path) -> None:
    edit_json(checkpoint / "config.json")
    (checkpoint / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"a LoRA adapter .*convert BASE DST --lora DIR"):
        load_checkpoint(checkpoint)
