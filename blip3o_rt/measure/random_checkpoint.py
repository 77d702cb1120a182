"""Seeded random checkpoints in the published layout: for tests, for trying a machine, and for the demo."""

from __future__ import annotations

import hashlib
import json
import math
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip3o_rt import __version__
from blip3o_rt.checkpoint.parts import DTYPES, layouts, published_name
from blip3o_rt.checkpoint.published import COMPONENTS
from blip3o_rt.checkpoint.published_config import ConfigFile, parse_model
from blip3o_rt.checkpoint.source import KNOWN, KNOWN_SANA, PathName
from blip3o_rt.checkpoint.tensor_file import CHUNK_BYTES, SafetensorsWriter, TensorHeader
from blip3o_rt.config import (
    ARConfig,
    DiTConfig,
    EditConfig,
    ImageTokenConfig,
    ModelConfig,
    SchedulerConfig,
    TATokConfig,
    VAEConfig,
    VAEStageConfig,
)
from blip3o_rt.errors import CheckpointError
from blip3o_rt.measure.random_tokenizer import SPECIAL_TOKENS, special_token_id, write_tokenizer
from blip3o_rt.tatok.layout import layout as ta_tok_layout

TOWERS = ("inside", "file", "none")
MADE_AHEAD = 2**29  # bytes of tensors that wait to be written


def preset(name: str, edit: EditConfig | None = None, *, channelwise_noise: bool = False) -> ModelConfig:
    """A named geometry: "tiny" (about 2 MB; 64 x 64 images of 64 tokens) or "published" (the 3B model).

    `edit` sets the editing flags (default: none). `channelwise_noise` doubles the DiT's channels, for
    a reference image beside the noise, channel by channel; it implies use_und_image_vae_as_noise.
    """
    builders = {"tiny": _tiny, "published": _published}
    if name not in builders:
        raise CheckpointError(f"preset is {name!r}; accepted: {' or '.join(builders)}")
    config = replace(builders[name](), edit=edit or EditConfig())
    if not channelwise_noise:
        return config
    channels = 2 * config.vae.latent_channels
    return replace(
        config,
        dit=replace(config.dit, in_channels=channels, out_channels=channels),
        edit=replace(config.edit, use_und_image_vae_as_noise=True),
    )


def _tiny() -> ModelConfig:
    text = 256 + len(SPECIAL_TOKENS)  # bytes, then the special tokens, then the image vocabulary
    stages = (
        VAEStageConfig(16, "ResBlock", 1, ()),
        VAEStageConfig(32, "ResBlock", 1, ()),
        VAEStageConfig(32, "EfficientViTBlock", 1, (5,)),
        VAEStageConfig(64, "EfficientViTBlock", 1, (5,)),
    )
    return ModelConfig(
        ar=ARConfig(text + 5 + 256, 64, 128, 2, 4, 2, 32, 1e-6, 1e6, 1024, False),
        image_tokens=ImageTokenConfig(text, text + 1, text + 2, text + 5, 256, 64),
        dit=DiTConfig(16, 16, 2, 4, 16, 2, 32, 96, 2.5, 1, 8, False, True, 1e-6, 1.0),
        vae=VAEConfig(3, 16, 32, stages, stages, "Conv", "interpolate", True, True, 0.41407, 0.0),
        scheduler=SchedulerConfig(),
        edit=EditConfig(),
        ta_tok=TATokConfig(64, 8, 3, 64, 128, 3, 2, 1e-6, -2, 32, 256),
    )


def _published() -> ModelConfig:
    config = ConfigFile.read(KNOWN / "BLIP3o-NEXT-3B" / "config.json")
    ta_tok = TATokConfig(384, 14, 3, 1152, 4304, 27, 16, 1e-6, -2, 1536, 65536)
    parts = {name: ConfigFile.read(KNOWN_SANA / file) for name, file in COMPONENTS.items()}
    return parse_model(config, parts, {}, ta_tok, ta_tok.tokens)


def folder_name(config: ModelConfig) -> str:
    """Name for the folder of a random checkpoint that is kept: another version or geometry has another."""
    geometry = json.dumps(asdict(config), sort_keys=True).encode()
    return f"random-{__version__}-{hashlib.sha256(geometry).hexdigest()[:12]}"


def write_random_checkpoint(
    destination: PathName,
    config: ModelConfig | str = "tiny",
    *,
    seed: int = 0,
    dtype: str = "bf16",
    shards: int = 1,
    tower: str = "inside",
) -> ModelConfig:
    """Write a checkpoint of random weights in the published layout into a new folder; returns its geometry.

    `config` is a geometry or the name of a preset, `dtype` "bf16" or "fp32", `shards` the number of weight
    files. `tower` says where the vision tower's weights go: "inside" the checkpoint, into a ta_tok.pth
    "file", or nowhere ("none", a text-to-image-only checkpoint). A tensor's values depend on the seed, its
    name and its shape alone. They are scaled (normal, variance 1 / fan-in; norms about 1) so that
    activations stay sane.

    Weights are made by as many threads as torch uses and written in order. Some 512 MiB and the largest
    tensor exist in memory at a time; a ta_tok.pth is made there.
    Raises CheckpointError when the folder exists or an argument is not accepted.
    """
    folder = Path(destination)
    model = preset(config) if isinstance(config, str) else config
    _check_arguments(folder, model, dtype, shards, tower)
    folder.mkdir(parents=True, exist_ok=True)
    if model.ta_tok is not None:  # without a tower too: the image's token count is read from it
        _write_siglip(folder, model.ta_tok)
    if tower == "none":
        model = replace(model, ta_tok=None)
    _write_configs(folder, model, dtype)
    write_tokenizer(folder, model)
    headers = _headers(model, DTYPES[dtype], inside=tower == "inside")
    _write_shards(folder, headers, seed, shards)
    if tower == "file" and model.ta_tok is not None:
        _write_ta_tok(folder, model.ta_tok, DTYPES[dtype], seed)
    return model


def _check_arguments(folder: Path, model: ModelConfig, dtype: str, shards: int, tower: str) -> None:
    if folder.exists() and any(folder.iterdir()):
        raise CheckpointError(f"{folder}: exists; accepted: a new or empty folder")
    if dtype not in DTYPES:
        raise CheckpointError(f"dtype is {dtype!r}; accepted: {' or '.join(DTYPES)}")
    if tower not in TOWERS or (model.ta_tok is None and tower == "file"):
        raise CheckpointError(f"tower is {tower!r}; accepted: {', '.join(TOWERS)} ('file' needs a tower)")
    if not 1 <= shards <= 99_999:
        raise CheckpointError(f"shards is {shards}; accepted: 1 to 99999")


def _headers(model: ModelConfig, dtype: torch.dtype, *, inside: bool) -> list[TensorHeader]:
    """Every original tensor of the model, under its published name."""
    return [
        TensorHeader(published_name(part, source.name), source.shape, dtype)
        for part, specs in layouts(model).items()
        if inside or part != "ta_tok"
        for spec in specs
        for source in spec.sources
    ]


def _write_shards(folder: Path, headers: list[TensorHeader], seed: int, shards: int) -> None:
    groups = _split(headers, shards)
    if len(groups) == 1:
        _write_tensors(folder / "model.safetensors", headers, seed)
        return
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, start=1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        _write_tensors(folder / name, group, seed)
        weight_map |= {header.name: name for header in group}
    total = sum(header.size for header in headers)
    _write_json(
        folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
    )


def _split(headers: list[TensorHeader], shards: int) -> list[list[TensorHeader]]:
    """Consecutive groups of about equal bytes; fewer than asked for where there are too few tensors."""
    total = sum(header.size for header in headers)
    groups: list[list[TensorHeader]] = [[] for _ in range(shards)]
    before = 0
    for header in headers:
        groups[min(shards - 1, before * shards // max(1, total))].append(header)
        before += header.size
    return [group for group in groups if group]


def _write_tensors(path: Path, headers: list[TensorHeader], seed: int) -> None:
    with SafetensorsWriter(path, headers) as writer:
        for piece in _made_ahead(headers, seed):
            writer.write(piece)


def _made_ahead(headers: list[TensorHeader], seed: int) -> Iterator[Tensor]:
    """The pieces of all tensors in order, each tensor made by one of as many threads as torch uses."""
    waiting: deque[tuple[int, Future[list[Tensor]]]] = deque()
    ahead = 0
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for header in headers:
            waiting.append((header.size, pool.submit(list, _random_pieces(header, seed))))
            ahead += header.size
            while ahead > MADE_AHEAD:
                size, made = waiting.popleft()
                yield from made.result()
                ahead -= size
        for _, made in waiting:
            yield from made.result()


def _random_pieces(header: TensorHeader, seed: int) -> Iterator[Tensor]:
    """A tensor's random elements in order, as one-dimensional pieces."""
    digest = hashlib.sha256(f"{seed}:{header.name}:{header.shape}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    mean, deviation = _distribution(header)
    remaining = math.prod(header.shape)
    while remaining:
        count = min(remaining, CHUNK_BYTES // 4)
        piece = torch.empty(count).normal_(mean, deviation, generator=generator)
        yield piece.to(header.dtype)
        remaining -= count


def _distribution(header: TensorHeader) -> tuple[float, float]:
    """Mean and standard deviation: norms near 1, biases small, matrices by their fan-in."""
    if len(header.shape) == 1:
        return (1.0, 0.1) if header.name.endswith(".weight") else (0.0, 0.02)
    return 0.0, 1.0 / math.sqrt(math.prod(header.shape[1:]))


def _write_ta_tok(folder: Path, config: TATokConfig, dtype: torch.dtype, seed: int) -> None:
    state = {}
    for spec in ta_tok_layout(config):
        for source in spec.sources:
            header = TensorHeader(published_name("ta_tok", source.name), source.shape, dtype)
            state[source.name] = torch.cat(list(_random_pieces(header, seed))).reshape(source.shape)
    torch.save({"model": {"args": _ta_tok_arguments(config), "sd": state}}, folder / "ta_tok.pth")


def _ta_tok_arguments(config: TATokConfig) -> dict[str, Any]:
    bottleneck = {
        "bottleneck_dim": config.bottleneck_dim,
        "norm": "none",
        "regularizer": {
            "name": "simvq",
            "args": {"codebook_size": config.codebook_size, "l2_normalized": True},
        },
    }
    return {
        "bottleneck": {"name": "bottleneck", "args": bottleneck},
        "bottleneck_token_num": config.tokens,
        "input_size": config.image_size,
        "select_layer_id": config.selected_layer,
        "teacher": "siglip2",
    }


def _write_configs(folder: Path, model: ModelConfig, dtype: str) -> None:
    _write_json(folder / "config.json", _model_config(model, dtype))
    _write_json(
        folder / "generation_config.json",
        {
            "eos_token_id": special_token_id(model, "<|im_end|>"),
            "pad_token_id": special_token_id(model, "<|endoftext|>"),
        },
    )
    scheduler = model.scheduler
    components = {
        "transformer/config.json": transformer_config(model.dit),
        "vae/config.json": vae_config(model.vae),
        "scheduler/scheduler_config.json": {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": scheduler.num_train_timesteps,
            "shift": scheduler.shift,
        },
    }
    for name, data in components.items():
        (folder / "sana" / name).parent.mkdir(parents=True, exist_ok=True)
        _write_json(folder / "sana" / name, data)


def _model_config(model: ModelConfig, dtype: str) -> dict[str, Any]:
    tokens = model.image_tokens
    return {
        "architectures": ["blip3oQwenForInferenceLM"],
        "model_type": "blip3o_qwen_inference",
        "attention_bias": False,
        "diffusion_name_or_path": "sana",
        "eos_token_id": special_token_id(model, "<|im_end|>"),
        "hidden_act": "silu",
        "image_end_tag_id": tokens.image_end_tag_id,
        "image_start_tag_id": tokens.image_start_tag_id,
        "image_start_token_id": tokens.image_start_token_id,
        "mm_vision_tower": "ta_tok.pth",
        "num_image_tokens": tokens.num_image_tokens,
        "num_scale_tokens": tokens.image_start_token_id - tokens.scale_start_token_id,
        "pad_token_id": special_token_id(model, "<|endoftext|>"),
        "rope_scaling": None,
        "scale_start_token_id": tokens.scale_start_token_id,
        "torch_dtype": {"bf16": "bfloat16", "fp32": "float32"}[dtype],
        "use_sliding_window": False,
        **language_config(model.ar),
        **asdict(model.edit),
    }


def language_config(config: ARConfig) -> dict[str, Any]:
    """The geometry of the decoder, as transformers' Qwen3Config names it."""
    renamed = {"num_hidden_layers": "num_layers", "num_attention_heads": "num_heads"}
    renamed["num_key_value_heads"] = "num_kv_heads"
    own = asdict(config)
    return {name: own.pop(of) for name, of in renamed.items()} | own


def transformer_config(config: DiTConfig) -> dict[str, Any]:
    """transformer/config.json of a diffusers folder."""
    return {
        "_class_name": "SanaTransformer2DModel",
        "attention_bias": config.attention_bias,
        "attention_head_dim": config.head_dim,
        "caption_channels": config.caption_channels,
        "cross_attention_dim": config.width,
        "cross_attention_head_dim": config.cross_head_dim,
        "guidance_embeds": False,
        "in_channels": config.in_channels,
        "interpolation_scale": None,
        "mlp_ratio": config.mlp_ratio,
        "norm_elementwise_affine": False,
        "norm_eps": config.norm_eps,
        "num_attention_heads": config.num_heads,
        "num_cross_attention_heads": config.num_cross_heads,
        "num_layers": config.num_layers,
        "out_channels": config.out_channels,
        "patch_size": config.patch_size,
        "qk_norm": "rms_norm_across_heads" if config.qk_norm else None,
        "sample_size": config.sample_size,
        "timestep_scale": config.timestep_scale,
    }


def vae_config(config: VAEConfig) -> dict[str, Any]:
    """vae/config.json of a diffusers folder."""
    data: dict[str, Any] = {
        "_class_name": "AutoencoderDC",
        "attention_head_dim": config.attention_head_dim,
        "decoder_act_fns": "silu",
        "decoder_in_shortcut": config.decoder_in_shortcut,
        "decoder_norm_types": "rms_norm",
        "downsample_block_type": config.downsample,
        "encoder_out_shortcut": config.encoder_out_shortcut,
        "in_channels": config.image_channels,
        "latent_channels": config.latent_channels,
        "scaling_factor": config.scaling_factor,
        "upsample_block_type": config.upsample,
    }
    if config.shift_factor:
        data["shift_factor"] = config.shift_factor
    for side, stages in (("encoder", config.encoder_stages), ("decoder", config.decoder_stages)):
        data[f"{side}_block_out_channels"] = [stage.channels for stage in stages]
        data[f"{side}_block_types"] = [stage.block for stage in stages]
        data[f"{side}_layers_per_block"] = [stage.layers for stage in stages]
        data[f"{side}_qkv_multiscales"] = [list(stage.multiscales) for stage in stages]
    return data


def vision_config(config: TATokConfig) -> dict[str, Any]:
    """The geometry of the image tokenizer's tower, as transformers' SiglipVisionConfig names it."""
    return {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": config.hidden_size,
        "image_size": config.image_size,
        "intermediate_size": config.intermediate_size,
        "layer_norm_eps": config.layer_norm_eps,
        "num_attention_heads": config.num_heads,
        "num_channels": config.image_channels,
        "num_hidden_layers": config.num_layers,
        "patch_size": config.patch_size,
    }


def _write_siglip(folder: Path, config: TATokConfig) -> None:
    (folder / "siglip2").mkdir()
    vision = {"model_type": "siglip_vision_model", **vision_config(config)}
    _write_json(folder / "siglip2" / "config.json", {"model_type": "siglip", "vision_config": vision})


def _write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
