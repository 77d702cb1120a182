"""Reading published checkpoints: where everything is found, and what is refused with which words."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from blip3o_rt.checkpoint.load import load_checkpoint
from blip3o_rt.checkpoint.published import PublishedCheckpoint, open_published
from blip3o_rt.checkpoint.source import KNOWN_SANA, SANA_NAME, SIGLIP_NAME, PathName, Source, known_folder
from blip3o_rt.config import EditConfig, ModelConfig, SchedulerConfig
from blip3o_rt.errors import CheckpointError, ConfigError
from blip3o_rt.measure.random_checkpoint import preset, write_random_checkpoint

from .conftest import ALL_FLAGS, edit_json, edit_tensors

TRANSFORMER = "sana/transformer/config.json"
VAE = "sana/vae/config.json"
SCHEDULER = "sana/scheduler/scheduler_config.json"
SIGLIP = "siglip2/config.json"
MISSING = object()


def opened(path: PathName, **options: Any) -> PublishedCheckpoint:
    """A published checkpoint, opened and checked."""
    return open_published(Source(path, **options))


REFUSED: list[tuple[str, str, Any, str]] = [
    ("config.json", "architectures", ["LlamaForCausalLM"], "blip3oQwenForInferenceLM"),
    ("config.json", "architectures", MISSING, "blip3oQwenForInferenceLM"),
    ("config.json", "model_type", "qwen2", "blip3o_qwen"),
    ("config.json", "attention_bias", True, "false"),
    ("config.json", "hidden_act", "gelu", "silu"),
    ("config.json", "use_sliding_window", True, "false"),
    ("config.json", "layer_types", ["full_attention", "sliding_attention"], "full_attention"),
    ("config.json", "quantization_config", {"bits": 4}, "null"),
    ("config.json", "rope_scaling", {"rope_type": "yarn", "factor": 4.0}, "default"),
    ("config.json", "rope_parameters", {"rope_type": "linear", "rope_theta": 1e6}, "default"),
    ("config.json", "rope_theta", MISSING, "positive number"),
    ("config.json", "hidden_size", MISSING, "integer"),
    ("config.json", "hidden_size", "64", "integer"),
    ("config.json", "hidden_size", 64.0, "integer"),
    ("config.json", "hidden_size", True, "integer"),
    ("config.json", "hidden_size", -64, "at least 1"),
    ("config.json", "num_hidden_layers", 10**9, "1000"),
    ("config.json", "num_key_value_heads", 3, "divisor"),
    ("config.json", "head_dim", 33, "even"),
    ("config.json", "rms_norm_eps", 0, "positive number"),
    ("config.json", "rms_norm_eps", float("nan"), "positive number"),
    ("config.json", "tie_word_embeddings", "no", "true or false"),
    ("config.json", "image_start_token_id", 100_000, "below vocab_size"),
    ("config.json", "num_image_tokens", 100_000, "below vocab_size"),
    ("config.json", "only_use_und_image_vae_as_noise", True, "false"),
    ("config.json", "use_und_image_vae", 1, "true or false"),
    ("config.json", "diffusion_name_or_path", "somebody/else", "--diffusion"),
    (TRANSFORMER, "_class_name", "FluxTransformer2DModel", "SanaTransformer2DModel"),
    (TRANSFORMER, "guidance_embeds", True, "false"),
    (TRANSFORMER, "qk_norm", "layer_norm", "rms_norm_across_heads"),
    (TRANSFORMER, "interpolation_scale", 2.0, "null"),
    (TRANSFORMER, "norm_elementwise_affine", True, "false"),
    (TRANSFORMER, "cross_attention_dim", 63, "num_attention_heads"),
    (TRANSFORMER, "in_channels", 48, "16 or 32"),
    (TRANSFORMER, "out_channels", 5, "16"),
    (TRANSFORMER, "num_layers", 0, "at least 1"),
    (TRANSFORMER, "sample_size", MISSING, "integer"),
    (VAE, "_class_name", "AutoencoderKL", "AutoencoderDC"),
    (VAE, "latent_shift", 0.1, "null"),
    (VAE, "scaling_factor", MISSING, "positive number"),
    (VAE, "encoder_block_types", ["ResBlock", "ResBlock", "Swin", "ResBlock"], "EfficientViTBlock"),
    (VAE, "encoder_block_types", ["ResBlock"], "4 entries"),
    (VAE, "decoder_norm_types", "batch_norm", "rms_norm"),
    (VAE, "decoder_norm_types", ["rms_norm", "rms_norm", "rms_norm", "batch_norm"], "rms_norm"),
    (VAE, "decoder_act_fns", "relu6", "silu"),
    (VAE, "decoder_conv_act_fn", "silu", "relu"),
    (VAE, "encoder_layers_per_block", [1, 0, 1, 1], "0 only for the first"),
    (VAE, "decoder_qkv_multiscales", [[], [], [4], [5]], "odd kernel sizes"),
    (VAE, "decoder_qkv_multiscales", 5, "odd kernel sizes"),
    (VAE, "encoder_block_out_channels", [16, 32, 16, 64], "attention_head_dim"),
    (VAE, "encoder_block_out_channels", [16, 32, 32, 160], "finer neighbor"),
    (VAE, "encoder_block_out_channels", 64, "list"),
    (VAE, "downsample_block_type", "strided", "Conv"),
    (VAE, "upsample_block_type", "bilinear", "interpolate"),
    (VAE, "latent_channels", 24, "divisor"),
    (VAE, "in_channels", 4, "3, for RGB"),
    (SCHEDULER, "shift", 0, "positive number"),
    (SCHEDULER, "use_karras_sigmas", True, "false"),
    (SCHEDULER, "use_dynamic_shifting", True, "false"),
    ("config.json", "architectures", [{}], "blip3oQwenForInferenceLM"),
    ("config.json", "layer_types", 3, "full_attention"),
    ("config.json", "hidden_size", 10**12, "from 1 to 2147483647"),
    ("config.json", "hidden_size", 10**400, "from 1 to 2147483647"),
    ("config.json", "rope_theta", 10**400, "positive number"),
    ("config.json", "rope_theta", 1e-3, "from 1 to 1e+12"),
    (
        "config.json",
        "rope_parameters",
        {"rope_theta": 1e4},
        "rope_theta is 1000000.0; accepted: 10000, as rope_p",
    ),
    ("config.json", "rope_parameters", {"partial_rotary_factor": 0.5}, "not 'partial_rotary_factor'"),
    ("config.json", "rms_norm_eps", 1e30, "from 1e-12 to 0.01"),
    ("config.json", "max_position_embeddings", 2**30, "from 1 to 1048576"),
    ("config.json", "max_position_embeddings", 64, "more than the 64 tokens of an image"),
    ("config.json", "num_image_tokens", 255, "codebook_size, 256"),
    ("config.json", "diffusion_name_or_path", "a" * 5000, "--diffusion"),
    (TRANSFORMER, "mlp_ratio", 1e308, "from 0.0001 to 10000"),
    (TRANSFORMER, "norm_eps", 1e30, "from 1e-12 to 0.01"),
    (TRANSFORMER, "timestep_scale", 1e300, "from 0.0001 to 10000"),
    (VAE, "scaling_factor", 1e300, "from 0.0001 to 10000"),
    (VAE, "scaling_factor", 1e-300, "from 0.0001 to 10000"),
    (SCHEDULER, "shift", 1e-300, "from 0.01 to 100"),
    (SCHEDULER, "shift", 1e300, "from 0.01 to 100"),
    (SCHEDULER, "num_train_timesteps", 10**7, "from 1 to 1000000"),
    (SCHEDULER, "_class_name", "DDIMScheduler", "FlowMatchEulerDiscreteScheduler"),
    (SCHEDULER, "prediction_type", "epsilon", "flow_prediction"),
]


@pytest.mark.parametrize(
    ("file", "key", "value", "accepted"),
    REFUSED,
    ids=[
        f"{f.split('/')[-2:][0]}-{k}-{'missing' if v is MISSING else repr(v):.40}" for f, k, v, _ in REFUSED
    ],
)
def test_unknown_configuration_values_are_refused(
    file: str, key: str, value: Any, accepted: str, checkpoint: Path
) -> None:
    if value is MISSING:
        edit_json(checkpoint / file, remove=(key,))
    else:
        edit_json(checkpoint / file, {key: value})
    with pytest.raises(ConfigError) as refusal:
        opened(checkpoint)
    message = str(refusal.value)
    assert key in message
    assert accepted in message
    assert "accepted: " in message
    assert "\n" not in message
    assert len(message) < 1000
    assert ("missing" in message) == (value is MISSING)


def test_encoder_and_decoder_must_have_as_many_stages(checkpoint: Path) -> None:
    three: dict[str, Any] = {"block_out_channels": [16, 32, 64], "layers_per_block": [1, 1, 1]}
    three |= {"block_types": "ResBlock", "qkv_multiscales": [[], [], []]}
    edit_json(checkpoint / VAE, {f"decoder_{key}": value for key, value in three.items()})
    with pytest.raises(ConfigError, match=r"decoder_block_out_channels.*as many stages as encoder"):
        opened(checkpoint)


@pytest.mark.parametrize(
    ("section", "key", "value", "accepted"),
    [
        ("vision_config", "hidden_act", "quick_gelu", "gelu_pytorch_tanh"),
        ("vision_config", "model_type", "clip_vision_model", "siglip_vision_model"),
        ("vision_config", "num_attention_heads", 3, "divisor"),
        ("vision_config", "num_channels", 1, "3, for RGB"),
        ("vision_config", "patch_size", "8", "integer"),
    ],
)
def test_unknown_vision_values_are_refused(
    section: str, key: str, value: Any, accepted: str, checkpoint: Path
) -> None:
    vision = json.loads((checkpoint / SIGLIP).read_text())[section]
    edit_json(checkpoint / SIGLIP, {section: {**vision, key: value}})
    with pytest.raises(ConfigError, match=accepted):
        opened(checkpoint)


def with_ta_tok(folder: Path, change: dict[str, Any]) -> Path:
    """A checkpoint whose tower is in ta_tok.pth, with some of that file's settings changed."""
    write_random_checkpoint(folder, preset("tiny", ALL_FLAGS), seed=3, tower="file")
    data = torch.load(folder / "ta_tok.pth", weights_only=True)
    data["model"]["args"].update(change)
    torch.save(data, folder / "ta_tok.pth")
    return folder


@pytest.mark.parametrize(
    ("change", "accepted"),
    [
        ({"bottleneck": {"name": "bottleneck", "args": {"bottleneck_dim": 32}}}, "an object"),
        ({"input_size": 32}, "image_size"),
        ({"bottleneck_token_num": 81}, "8 x 8 patches, 64"),
        ({"select_layer_id": -9}, "hidden state"),
        ({"select_layer_id": "last"}, "hidden state"),
        ({"pool_scale": 2}, "1"),
        ({"bottleneck": 5}, "an object"),
    ],
)
def test_unknown_ta_tok_settings_are_refused(change: dict[str, Any], accepted: str, tmp_path: Path) -> None:
    folder = with_ta_tok(tmp_path / "source", change)
    with pytest.raises(ConfigError, match=accepted):
        opened(folder)


@pytest.mark.parametrize(
    "data", [{"sd": {}}, {"model": {"sd": {}}}, [1, 2], {"model": {"args": {}, "sd": 3}}]
)
def test_another_torch_file_is_not_ta_tok(data: object, tmp_path: Path) -> None:
    folder = with_ta_tok(tmp_path / "source", {})
    torch.save(data, folder / "ta_tok.pth")
    with pytest.raises(CheckpointError, match="not a TA-Tok file"):
        opened(folder)


@pytest.mark.parametrize("name", ["config.json", TRANSFORMER, VAE, SCHEDULER])
@pytest.mark.parametrize("content", [None, "{", "[1]", "\x00\xff"])
def test_missing_and_damaged_configuration_files_are_named(
    name: str, content: str | None, checkpoint: Path
) -> None:
    if content is None:
        (checkpoint / name).unlink()
    else:
        (checkpoint / name).write_bytes(content.encode("latin-1"))
    with pytest.raises((CheckpointError, ConfigError)) as refusal:
        opened(checkpoint)
    assert Path(name).parent.name in str(refusal.value) or Path(name).name in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a folder"):
        opened(tmp_path / "nothing")


def test_a_checkpoint_without_tokenizer_is_refused(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="no tokenizer"):
        opened(checkpoint)


def test_a_checkpoint_of_pickles_is_refused(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match=r"pytorch_model\.bin is a pickle; .*accepted: model\.safetensors"
    ):
        opened(checkpoint)


WEIGHT = "model.layers.1.mlp.up_proj.weight"


def test_a_missing_tensor_is_named(checkpoint: Path) -> None:
    edit_tensors(checkpoint / "model.safetensors", lambda tensors: tensors.pop(WEIGHT))
    with pytest.raises(CheckpointError, match=rf"{WEIGHT}' of shape \[128, 64\] is missing$"):
        load_checkpoint(checkpoint)


def test_a_renamed_tensor_is_suggested(checkpoint: Path) -> None:
    other = "model.layers.1.mlp.upproj.weight"
    edit_tensors(
        checkpoint / "model.safetensors", lambda tensors: tensors.update({other: tensors.pop(WEIGHT)})
    )
    with pytest.raises(
        CheckpointError, match=rf"{WEIGHT}.* is missing; the closest unused name there is '{other}'"
    ):
        load_checkpoint(checkpoint)


def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes(checkpoint: Path) -> None:
    edit_tensors(
        checkpoint / "model.safetensors",
        lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT].T.contiguous()}),
    )
    with pytest.raises(CheckpointError, match=rf"{WEIGHT}' has shape \[64, 128\]; accepted: \[128, 64\]"):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "name", [WEIGHT, "model.vision_tower.vision_tower.bottleneck.regularizer.embedding.weight"]
)
def test_a_tensor_that_is_not_finite_is_named(value: float, name: str, checkpoint: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[-1] = value

    edit_tensors(checkpoint / "model.safetensors", spoil)
    with pytest.raises(CheckpointError, match=rf"{name}' contains NaN or infinity; accepted: finite"):
        load_checkpoint(checkpoint)


def test_a_tensor_of_integers_is_refused(checkpoint: Path) -> None:
    edit_tensors(
        checkpoint / "model.safetensors",
        lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT].to(torch.int8)}),
    )
    with pytest.raises(CheckpointError, match=r"stored as torch\.int8; accepted: floating point"):
        load_checkpoint(checkpoint)


def test_an_unknown_tensor_is_a_warning_and_a_known_unused_one_is_not(checkpoint: Path) -> None:
    extra = {
        "model.mystery.weight": torch.zeros(2),
        "model.vision_tower.vision_tower.decoder.vision_model.head.probe": torch.zeros(2),
        "model.vision_tower.vision_tower.scale_layer.shift": torch.zeros(2),
        "model.und_image_vae_as_noise_connector.0.weight": torch.zeros(2),
    }
    edit_tensors(checkpoint / "model.safetensors", lambda tensors: tensors.update(extra))
    assert opened(checkpoint).warnings == ["model.mystery.weight is not known and was left out"]


def weights_equal(one: Path, other: Path, **arguments: Any) -> bool:
    """Whether two checkpoints load to the same weights, bit for bit."""
    first, second = load_checkpoint(one), load_checkpoint(Source(other, **arguments))
    assert first.weights.keys() == second.weights.keys()
    assert all(first.weights[part].keys() == second.weights[part].keys() for part in first.weights)
    return all(
        torch.equal(tensor, second.weights[part][name])
        for part, tensors in first.weights.items()
        for name, tensor in tensors.items()
    )


@pytest.mark.parametrize("shards", [2, 5])
def test_sharded_equals_single(shards: int, checkpoint: Path, tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "sharded", preset("tiny", ALL_FLAGS), seed=3, shards=shards)
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) == shards
    assert weights_equal(checkpoint, tmp_path / "sharded")
    (tmp_path / "sharded" / "model.safetensors.index.json").unlink()
    assert weights_equal(checkpoint, tmp_path / "sharded")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "source", shards=3)
    (tmp_path / "source" / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors: not found"):
        opened(tmp_path / "source")


@pytest.mark.parametrize("weight_map", [None, {"a": "../x.safetensors"}, {"a": 3}])
def test_a_bad_shard_index_is_refused(weight_map: object, tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "source", shards=2)
    edit_json(tmp_path / "source" / "model.safetensors.index.json", {"weight_map": weight_map})
    with pytest.raises(CheckpointError, match=r"index\.json"):
        opened(tmp_path / "source")


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "source", shards=2)
    first, second = sorted((tmp_path / "source").glob("model-*.safetensors"))
    name, tensor = next(iter(load_file(first).items()))
    edit_tensors(second, lambda tensors: tensors.update({name: tensor.clone()}))
    with pytest.raises(CheckpointError, match="is in both"):
        opened(tmp_path / "source")


def tied(config: ModelConfig) -> ModelConfig:
    return replace(config, ar=replace(config.ar, tie_word_embeddings=True))


def test_a_tied_head_has_no_weight(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "source", tied(preset("tiny")))
    loaded = load_checkpoint(tmp_path / "source")
    assert loaded.config.ar.tie_word_embeddings
    assert "lm_head.weight" not in loaded.weights["ar"]
    edit_json(tmp_path / "source" / "config.json", remove=("tie_word_embeddings",))
    assert load_checkpoint(tmp_path / "source").config == loaded.config
    edit_json(tmp_path / "source" / "config.json", {"tie_word_embeddings": False})
    with pytest.raises(
        CheckpointError, match=r"lm_head\.weight.* is missing \(absent only where tie_word_embeddings"
    ):
        load_checkpoint(tmp_path / "source")


def test_a_head_beside_a_tied_one_must_be_the_same(checkpoint: Path) -> None:
    edit_json(checkpoint / "config.json", {"tie_word_embeddings": True})
    with pytest.raises(
        CheckpointError, match=r"tie_word_embeddings is true but .* has another 'lm_head.weight'"
    ):
        load_checkpoint(checkpoint)
    edit_tensors(
        checkpoint / "model.safetensors",
        lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}),
    )
    assert "lm_head.weight" not in load_checkpoint(checkpoint).weights["ar"]


def test_the_tower_inside_equals_the_tower_in_a_file(checkpoint: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    write_random_checkpoint(outside, preset("tiny", ALL_FLAGS), seed=3, tower="file")
    assert "ta_tok.pth" in {path.name for path in opened(outside).files}
    assert weights_equal(checkpoint, outside)


def test_the_tower_inside_wins_unless_a_file_is_given(checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_random_checkpoint(other, preset("tiny", ALL_FLAGS), seed=4, tower="file")
    before = load_checkpoint(checkpoint).weights["ta_tok"]["codebook"]
    given = load_checkpoint(Source(checkpoint, ta_tok=other / "ta_tok.pth")).weights["ta_tok"]["codebook"]
    shutil.copy(other / "ta_tok.pth", checkpoint / "ta_tok.pth")
    beside = load_checkpoint(checkpoint).weights["ta_tok"]["codebook"]
    assert torch.equal(before, beside)
    assert not torch.equal(before, given)


def test_a_tower_elsewhere_is_found_where_it_is_named(tmp_path: Path) -> None:
    folder = with_ta_tok(tmp_path / "source", {})
    expected = load_checkpoint(folder).weights["ta_tok"]["codebook"]
    (folder / "ta_tok.pth").rename(tmp_path / "tower.pth")
    assert opened(folder).config.ta_tok is None
    edit_json(folder / "config.json", {"mm_vision_tower": "../tower.pth"})
    assert torch.equal(load_checkpoint(folder).weights["ta_tok"]["codebook"], expected)
    edit_json(folder / "config.json", {"mm_vision_tower": "/nobody/has/this/ta_tok.pth"})
    found = load_checkpoint(Source(folder, ta_tok=tmp_path / "tower.pth")).weights["ta_tok"]["codebook"]
    assert torch.equal(found, expected)


def test_a_checkpoint_without_tower_draws_only(tmp_path: Path) -> None:
    config = write_random_checkpoint(tmp_path / "source", preset("tiny", ALL_FLAGS), tower="none")
    original = opened(tmp_path / "source")
    assert original.config == config
    assert original.config.ta_tok is None
    assert original.config.image_tokens.tokens_per_image == 64
    assert any("no vision tower" in warning for warning in original.warnings)
    (tmp_path / "source" / SIGLIP).unlink()
    assert opened(tmp_path / "source").config.image_tokens.tokens_per_image == 729


def test_the_codebook_is_the_normalised_projection(checkpoint: Path) -> None:
    """Against float64: float32 sums of 32 products and a norm are good to 1e-6."""
    tensors = load_file(checkpoint / "model.safetensors")
    prefix = "model.vision_tower.vision_tower.bottleneck.regularizer."
    embedding = tensors[prefix + "embedding.weight"].double()
    weight = tensors[prefix + "embedding_proj.weight"].double()
    rows = embedding @ weight.T + tensors[prefix + "embedding_proj.bias"].double()
    codebook = load_checkpoint(checkpoint).weights["ta_tok"]["codebook"]
    assert codebook.dtype == torch.float32
    torch.testing.assert_close(codebook.double(), rows / rows.norm(dim=1, keepdim=True), rtol=1e-6, atol=1e-6)


def move_out(checkpoint: Path, prefix: str, folder: Path) -> None:
    """Move the tensors under a prefix out of a checkpoint into a diffusers component folder."""
    tensors = load_file(checkpoint / "model.safetensors")
    moved = {name: tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    stock = {name.removeprefix(prefix): tensor for name, tensor in moved.items()}
    save_file(stock, folder / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize(
    ("prefix", "component"), [("model.sana.", "transformer"), ("model.sana_vae.", "vae")]
)
def test_stock_weights_serve_where_the_checkpoint_has_none(
    prefix: str, component: str, checkpoint: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    move_out(copy, prefix, copy / "sana" / component)
    options: dict[str, Any] = {}
    if component == "transformer":  # it is trained further, the autoencoder is not
        with pytest.raises(CheckpointError, match=r"no tensors under model\.sana\..*--allow-base-weights"):
            load_checkpoint(copy)
        options = {"allow_base_weights": True}
        assert "untrained" in opened(copy, **options).warnings[0]
    assert weights_equal(checkpoint, copy, **options)
    (copy / "sana").rename(tmp_path / "diffusers")
    assert weights_equal(checkpoint, copy, diffusion=tmp_path / "diffusers", **options)


def test_the_checkpoints_weights_win_over_stock_ones(checkpoint: Path, tmp_path: Path) -> None:
    stock = {"proj_out.bias": torch.full((16,), 9.0)}
    save_file(stock, checkpoint / "sana" / "transformer" / "diffusion_pytorch_model.safetensors")
    bias = load_checkpoint(checkpoint).weights["dit"]["proj_out.bias"]
    assert not torch.equal(bias.float(), stock["proj_out.bias"])


def test_missing_stock_weights_are_asked_for(checkpoint: Path) -> None:
    edit_tensors(
        checkpoint / "model.safetensors",
        lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("model.sana.")],
    )
    with pytest.raises(CheckpointError, match="transformer: no weights"):
        opened(checkpoint, allow_base_weights=True)


@pytest.mark.parametrize(
    "name",
    [
        SANA_NAME,
        "/somebody/models/SANA1.5_1.6B_1024px_diffusers",
        "/cache/hub/models--Efficient-Large-Model--SANA1.5_1.6B_1024px_diffusers/snapshots/0123abc",
    ],
)
def test_a_published_name_needs_no_folder(name: str, checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "sana")
    edit_json(checkpoint / "config.json", {"diffusion_name_or_path": name})
    published = preset("published")
    assert known_folder(name, SANA_NAME) == KNOWN_SANA
    assert (published.dit.num_layers, published.vae.scaling_factor) == (20, 0.41407)
    assert published.scheduler == SchedulerConfig(1000, 1.0)
    with pytest.raises(CheckpointError, match=r"has shape .*; accepted: \[2304, 64\]"):
        opened(checkpoint)


def test_the_published_siglip_is_known_by_name(tmp_path: Path) -> None:
    folder = with_ta_tok(
        tmp_path / "source",
        {"teacher": SIGLIP_NAME, "input_size": 384, "bottleneck_token_num": 729},
    )
    shutil.rmtree(folder / "siglip2")
    with pytest.raises(CheckpointError, match=r"has shape .*; accepted: \[64, 1152\]"):
        opened(folder)
    data = torch.load(folder / "ta_tok.pth", weights_only=True)
    data["model"]["args"]["teacher"] = "openai/clip"
    torch.save(data, folder / "ta_tok.pth")
    with pytest.raises(ConfigError, match="teacher is 'openai/clip'; accepted: google/siglip2"):
        opened(folder)


def test_a_given_folder_that_is_not_diffusers_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no transformer/config\.json"):
        opened(checkpoint, diffusion=tmp_path)


def test_shift_is_honoured_and_flow_shift_is_not(checkpoint: Path) -> None:
    edit_json(checkpoint / SCHEDULER, {"_class_name": "DPMSolverMultistepScheduler", "flow_shift": 3.0})
    assert opened(checkpoint).config.scheduler.shift == 1.0
    edit_json(checkpoint / SCHEDULER, {"shift": 2.5})
    assert opened(checkpoint).config.scheduler.shift == 2.5


def test_rope_theta_may_stand_in_rope_parameters(checkpoint: Path) -> None:
    edit_json(
        checkpoint / "config.json",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        remove=("rope_theta", "rope_scaling"),
    )
    assert opened(checkpoint).config.ar.rope_theta == 5e5


def test_head_dim_may_be_missing(checkpoint: Path) -> None:
    edit_json(checkpoint / "config.json", remove=("head_dim",))
    assert opened(checkpoint).config.ar.head_dim == 32  # as the weights have it, not 64 / 4


@pytest.mark.parametrize("stated", [16, 32])
def test_the_channelwise_variant_is_seen_in_the_weights(stated: int, tmp_path: Path) -> None:
    config = preset("tiny", channelwise_noise=True)
    write_random_checkpoint(tmp_path / "source", config)
    edit_json(tmp_path / "source" / TRANSFORMER, {"in_channels": stated, "out_channels": stated})
    assert load_checkpoint(tmp_path / "source").config == config
    edit_json(tmp_path / "source" / "config.json", {"use_und_image_vae_as_noise": False})
    with pytest.raises(ConfigError, match="in_channels is 32; accepted: 16"):
        opened(tmp_path / "source")


@pytest.mark.parametrize("flags", [EditConfig(), EditConfig(True), EditConfig(False, True), ALL_FLAGS])
def test_editing_flags_decide_the_connectors(flags: EditConfig, tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "source", preset("tiny", flags))
    loaded = load_checkpoint(tmp_path / "source")
    assert loaded.config.edit == flags
    connectors = {name.split(".")[0] for name in loaded.weights["connector"]}
    expected = {"diffusion_connector"}
    expected |= {"und_image_vae_connector"} if flags.use_und_image_vae else set()
    expected |= {"tar_siglip_features_connector"} if flags.use_tar_siglip_features else set()
    assert connectors == expected
