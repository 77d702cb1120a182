"""From published configuration files to the runtime's, refusing every value that it does not compute."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from blip3o_rt.checkpoint.parts import published_name
from blip3o_rt.checkpoint.source import refuse_stand_in
from blip3o_rt.config import (
    MAX_LAYERS,
    TOKEN_IDS,
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
from blip3o_rt.errors import CheckpointError, ConfigError

REQUIRED = object()  # the default of a key that has none
LARGEST_INTEGER = 2**31 - 1  # of a size or an id
LONGEST_VALUE = 80  # characters of a value in a message
ARCHITECTURES = ("blip3oQwenForInferenceLM", "blip3oQwenForCausalLM", "blip3oQwenForGRPOLM")
MODEL_TYPES = ("blip3o_qwen_inference", "blip3o_qwen", "blip3o_qwen_grpo")
SCHEDULER_SWITCHES = (
    "use_dynamic_shifting",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "invert_sigmas",
    "stochastic_sampling",
)


T = TypeVar("T")
Part = TypeVar("Part", ModelConfig, ARConfig, DiTConfig, VAEConfig, SchedulerConfig, TATokConfig)


class ConfigFile:
    """One configuration dictionary and the name it has in messages.

    Every getter raises ConfigError when the key is missing (and has no default) or holds a value that is not
    accepted.
    """

    def __init__(self, name: str, data: dict[str, Any]) -> None:
        self.name = name
        self.data = data

    @classmethod
    def read(cls, path: Path) -> ConfigFile:
        """Parse a file. Raises CheckpointError when it is missing or not a JSON object."""
        try:
            refuse_stand_in(path)
            content = path.read_bytes()
        except FileNotFoundError:
            raise CheckpointError(f"{path}: not found; accepted: a checkpoint folder that has it") from None
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror}); copy it again") from None
        try:
            data = json.loads(content.decode())
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: not a readable JSON file ({error}); copy it again") from None
        if not isinstance(data, dict):
            raise CheckpointError(f"{path}: holds a JSON {type(data).__name__}; accepted: a JSON object")
        return cls(str(path), data)

    def section(self, key: str) -> ConfigFile:
        """The object under `key`."""
        return ConfigFile(f"{self.name}: {key}", self._of(dict, key, REQUIRED, "an object"))

    def error(self, key: str, accepted: str) -> ConfigError:
        """The ConfigError for a missing or unaccepted value of `key`."""
        if key not in self.data:
            return ConfigError(f"{self.name}: {key} is missing; accepted: {accepted}")
        return ConfigError(f"{self.name}: {key} is {_shown(self.data[key])}; accepted: {accepted}")

    def checked(self, part: Part) -> Part:
        """A part made of this configuration, its numbers checked."""
        try:
            part.check()
        except ConfigError as error:
            raise ConfigError(f"{self.name}: {error}") from None
        return part

    def _get(self, key: str, default: Any) -> Any:
        """The value, or the default where it is missing or null; REQUIRED itself where there is neither."""
        value = self.data.get(key)
        return default if value is None else value

    def _of(self, kind: type[T], key: str, default: Any, accepted: str) -> T:
        value = self._get(key, default)
        if not isinstance(value, kind):
            raise self.error(key, accepted)
        return value

    def integer(self, key: str, default: Any = REQUIRED, minimum: int = 1) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.error(key, f"an integer of at least {minimum}")
        if value > LARGEST_INTEGER:
            raise self.error(key, f"an integer from {minimum} to {LARGEST_INTEGER}")
        return value

    def number(self, key: str, default: Any = REQUIRED, *, positive: bool = True) -> float:
        value = self._get(key, default)
        accepted = "a positive number" if positive else "a finite number"
        if isinstance(value, bool) or not isinstance(value, int | float) or (positive and not value > 0):
            raise self.error(key, accepted)
        if not abs(value) <= sys.float_info.max:
            raise self.error(key, f"{accepted} that is finite")
        return float(value)

    def boolean(self, key: str, default: Any = REQUIRED) -> bool:
        return self._of(bool, key, default, "true or false")

    def text(self, key: str, default: Any = REQUIRED) -> str:
        return self._of(str, key, default, "text")

    def choice(self, key: str, accepted: Sequence[str], default: Any = REQUIRED) -> str:
        value = self._get(key, default)
        if value not in accepted:
            raise self.error(key, " or ".join(repr(option) for option in accepted))
        return str(value)

    def only(self, accepted: Any, *keys: str, required: bool = False) -> None:
        """Refuse anything but the one accepted value (or, unless required, a missing or null one)."""
        for key in keys:
            value = self.data.get(key)
            unset = value is None and not required
            if not unset and (value != accepted or type(value) is not type(accepted)):
                raise self.error(key, json.dumps(accepted))

    def per_stage(self, key: str, count: int, default: Any = REQUIRED) -> list[Any]:
        """A list of `count` entries, or one value that stands for all of them."""
        value = self._get(key, default)
        if value is REQUIRED:
            raise self.error(key, f"a list of {count} entries")
        if not isinstance(value, list | tuple):
            return [value] * count
        if len(value) != count:
            raise self.error(key, f"a list of {count} entries, as many as there are block_out_channels")
        return list(value)


def _shown(value: object) -> str:
    """A value as a message shows it."""
    text = repr(value)
    return text if len(text) <= LONGEST_VALUE else text[:LONGEST_VALUE] + "..."


def parse_model(
    config: ConfigFile,
    parts: Mapping[str, ConfigFile],
    shapes: Mapping[str, tuple[int, ...]],
    ta_tok: TATokConfig | None,
    tokens_per_image: int,
) -> ModelConfig:
    """The whole model, from the checkpoint's configuration and those of its diffusers components.

    `shapes` of the checkpoint's weights settle what configuration files leave out.
    """
    model = ModelConfig(
        ar=parse_ar(config, shapes),
        image_tokens=parse_image_tokens(config, tokens_per_image),
        dit=parse_dit(parts["transformer"], shapes),
        vae=parse_vae(parts["vae"]),
        scheduler=parse_scheduler(parts["scheduler"]),
        edit=parse_edit(config),
        ta_tok=ta_tok,
    )
    return config.checked(model)


def parse_ar(config: ConfigFile, shapes: Mapping[str, tuple[int, ...]]) -> ARConfig:
    """The decoder's numbers. `shapes` of the weights settle what older configuration files leave out."""
    architectures = config.data.get("architectures")
    if not isinstance(architectures, list) or not any(name in ARCHITECTURES for name in architectures):
        raise config.error("architectures", " or ".join(ARCHITECTURES))
    config.choice("model_type", MODEL_TYPES)
    config.only(False, "attention_bias", "use_sliding_window")
    config.only("silu", "hidden_act")
    config.only(1.0, "partial_rotary_factor")
    config.only(None, "compression_config", "quantization_config")
    kinds = config.data.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise config.error("layer_types", '"full_attention" for every layer')
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    query_norm = shapes.get(published_name("ar", "layers.0.self_attn.q_norm.weight"))
    return config.checked(
        ARConfig(
            vocab_size=config.integer("vocab_size"),
            hidden_size=hidden,
            intermediate_size=config.integer("intermediate_size"),
            num_layers=config.integer("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=config.integer("num_key_value_heads"),
            head_dim=config.integer("head_dim", query_norm[0] if query_norm else hidden // heads),
            rms_norm_eps=config.number("rms_norm_eps"),
            rope_theta=_rope_theta(config),
            max_position_embeddings=config.integer("max_position_embeddings"),
            tie_word_embeddings=config.boolean(
                "tie_word_embeddings", published_name("ar", "lm_head.weight") not in shapes
            ),
        )
    )


def _rope_theta(config: ConfigFile) -> float:
    """rope_theta from the top level or from rope_parameters, where newer transformers writes it."""
    for key in ("rope_scaling", "rope_parameters"):
        rope = config.data.get(key)
        if rope is None:
            continue
        if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type", "default")) != "default":
            raise config.error(key, 'null or {"rope_type": "default"}')
        strange = [name for name in rope if name not in ("rope_type", "type", "rope_theta")]
        if strange:
            raise config.error(key, f"rope_type and rope_theta, not {strange[0]!r}")
        if rope.get("rope_theta") is not None:
            theta = config.section(key).number("rope_theta")
            if config.number("rope_theta", theta) != theta:
                raise config.error("rope_theta", f"{theta:g}, as {key} says, or one of the two")
            return theta
    return config.number("rope_theta")


def parse_image_tokens(config: ConfigFile, tokens_per_image: int) -> ImageTokenConfig:
    """Ids of the image tokens, which the whole model's check compares with the vocabulary."""
    return ImageTokenConfig(
        **{name: config.integer(name, minimum=0) for name in TOKEN_IDS},
        num_image_tokens=config.integer("num_image_tokens"),
        tokens_per_image=tokens_per_image,
    )


def parse_edit(config: ConfigFile) -> EditConfig:
    """The editing flags; a flag that is missing is off."""
    config.only(False, "only_use_und_image_vae_as_noise")
    return EditConfig(**{flag.name: config.boolean(flag.name, False) for flag in fields(EditConfig)})


def parse_dit(config: ConfigFile, shapes: Mapping[str, tuple[int, ...]]) -> DiTConfig:
    """SANA's numbers, from a SanaTransformer2DModel configuration.

    The channel counts are those of the trained weights where the checkpoint has them: the channel-wise
    editing variant widens them, and no configuration file says so.
    """
    patch = shapes.get(published_name("dit", "patch_embed.proj.weight"), ())
    projection = shapes.get(published_name("dit", "proj_out.weight"), ())
    if len(patch) == 4 and len(projection) == 2 and patch[1] == 2 * config.integer("in_channels"):
        widened = {"in_channels": patch[1], "out_channels": projection[0] // max(1, patch[2] * patch[3])}
        config = ConfigFile(config.name, {**config.data, **widened})
    config.only("SanaTransformer2DModel", "_class_name")
    config.only(False, "guidance_embeds", "norm_elementwise_affine")
    config.only(None, "interpolation_scale")
    if config.data.get("qk_norm") not in (None, "rms_norm_across_heads"):
        raise config.error("qk_norm", "null or 'rms_norm_across_heads'")
    heads, head_dim = config.integer("num_attention_heads"), config.integer("attention_head_dim")
    width = heads * head_dim
    if config.integer("cross_attention_dim", width) != width:
        raise config.error("cross_attention_dim", f"num_attention_heads * attention_head_dim, {width}")
    in_channels = config.integer("in_channels")
    return config.checked(
        DiTConfig(
            in_channels=in_channels,
            out_channels=config.integer("out_channels", in_channels),
            num_layers=config.integer("num_layers"),
            num_heads=heads,
            head_dim=head_dim,
            num_cross_heads=config.integer("num_cross_attention_heads"),
            cross_head_dim=config.integer("cross_attention_head_dim"),
            caption_channels=config.integer("caption_channels"),
            mlp_ratio=config.number("mlp_ratio", 2.5),
            patch_size=config.integer("patch_size", 1),
            sample_size=config.integer("sample_size"),
            attention_bias=config.boolean("attention_bias", False),
            qk_norm=config.data.get("qk_norm") is not None,
            norm_eps=config.number("norm_eps", 1e-6),
            timestep_scale=config.number("timestep_scale", 1.0),
        )
    )


def parse_vae(config: ConfigFile) -> VAEConfig:
    """DC-AE's numbers, from an AutoencoderDC configuration."""
    config.only("AutoencoderDC", "_class_name")
    config.only(None, "latent_shift", "latents_mean", "latents_std")
    config.only("relu", "decoder_conv_act_fn")
    return config.checked(
        VAEConfig(
            image_channels=config.integer("in_channels", 3),
            latent_channels=config.integer("latent_channels"),
            attention_head_dim=config.integer("attention_head_dim", 32),
            encoder_stages=_stages(config, "encoder"),
            decoder_stages=_stages(config, "decoder"),
            downsample=config.text("downsample_block_type", "pixel_unshuffle"),
            upsample=config.text("upsample_block_type", "pixel_shuffle"),
            encoder_out_shortcut=config.boolean("encoder_out_shortcut", True),
            decoder_in_shortcut=config.boolean("decoder_in_shortcut", True),
            scaling_factor=config.number("scaling_factor"),
            shift_factor=config.number("shift_factor", 0.0, positive=False),
        )
    )


def _stages(config: ConfigFile, side: str) -> tuple[VAEStageConfig, ...]:
    key = f"{side}_block_out_channels"
    channels = config.data.get(key)
    if not isinstance(channels, list | tuple) or len(channels) < 2 or not _counts(channels, 1):
        raise config.error(key, "a list of at least two channel counts")
    count = len(channels)
    blocks = config.per_stage(f"{side}_block_types", count, "ResBlock")
    layers = config.per_stage(f"{side}_layers_per_block", count)
    if not _counts(layers, 0):
        raise config.error(
            f"{side}_layers_per_block", "positive integers (0 only for the first and the last)"
        )
    scales = config.data.get(f"{side}_qkv_multiscales")
    if not isinstance(scales, list | tuple) or len(scales) != count or not all(_counts(s, 1) for s in scales):
        raise config.error(f"{side}_qkv_multiscales", f"a list of {count} lists of odd kernel sizes")
    if side == "decoder":
        for key, accepted in (("decoder_norm_types", "rms_norm"), ("decoder_act_fns", "silu")):
            if any(value != accepted for value in config.per_stage(key, count, accepted)):
                raise config.error(key, repr(accepted))
    return tuple(
        VAEStageConfig(width, block, depth, tuple(kernels) if block == "EfficientViTBlock" else ())
        for width, block, depth, kernels in zip(channels, blocks, layers, scales, strict=True)
    )


def _counts(values: object, minimum: int) -> bool:
    """Whether these are integers of at least `minimum`."""
    return isinstance(values, list | tuple) and all(
        isinstance(value, int) and not isinstance(value, bool) and minimum <= value <= LARGEST_INTEGER
        for value in values
    )


def parse_scheduler(config: ConfigFile) -> SchedulerConfig:
    """The Euler schedule; no other schedule or prediction is computed.

    Published folders are written for DPMSolverMultistep, whose key `flow_shift` has no effect here.
    """
    classes = ("FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler")
    config.choice("_class_name", classes, classes[0])
    config.only("flow_prediction", "prediction_type")
    config.only(False, *SCHEDULER_SWITCHES)
    config.only(None, "shift_terminal")
    return config.checked(
        SchedulerConfig(
            num_train_timesteps=config.integer("num_train_timesteps", 1000), shift=config.number("shift", 1.0)
        )
    )


def parse_ta_tok(settings: ConfigFile, vision: ConfigFile) -> TATokConfig:
    """TA-Tok's numbers, from its own settings and SigLIP's vision configuration.

    Keys that the vision configuration lacks have the defaults of that architecture.
    """
    vision.choice("model_type", ("siglip_vision_model",), "siglip_vision_model")
    vision.only("gelu_pytorch_tanh", "hidden_act")
    bottleneck = settings.section("bottleneck").section("args")
    bottleneck.only("none", "norm")
    regularizer = bottleneck.section("regularizer")
    regularizer.only("simvq", "name", required=True)
    codebook = regularizer.section("args")
    codebook.only(True, "l2_normalized", required=True)
    settings.only(1, "pool_scale")
    image_size = vision.integer("image_size", 224)
    if settings.integer("input_size", image_size) != image_size:
        raise settings.error("input_size", f"SigLIP's image_size, {image_size}")
    if vision.integer("num_channels", 3) != 3:
        raise vision.error("num_channels", "3, for RGB")
    if not _counts([settings.data.get("select_layer_id", -2)], -MAX_LAYERS):
        raise settings.error("select_layer_id", "an integer, the hidden state to take")
    config = TATokConfig(
        image_size=image_size,
        patch_size=vision.integer("patch_size", 16),
        image_channels=3,
        hidden_size=vision.integer("hidden_size", 768),
        intermediate_size=vision.integer("intermediate_size", 3072),
        num_layers=vision.integer("num_hidden_layers", 12),
        num_heads=vision.integer("num_attention_heads", 12),
        layer_norm_eps=vision.number("layer_norm_eps", 1e-6),
        selected_layer=settings.data.get("select_layer_id", -2),
        bottleneck_dim=bottleneck.integer("bottleneck_dim"),
        codebook_size=codebook.integer("codebook_size"),
    )
    vision.checked(config)
    if settings.integer("bottleneck_token_num", config.tokens) != config.tokens:
        raise settings.error(
            "bottleneck_token_num", f"SigLIP's {config.grid} x {config.grid} patches, {config.tokens}"
        )
    return config
