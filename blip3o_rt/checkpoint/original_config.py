"""From published configuration files to the runtime's, refusing every value that it does not compute."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from blip3o_rt.checkpoint.config_file import MAX_LAYERS, ConfigFile
from blip3o_rt.checkpoint.parts import published_name
from blip3o_rt.config import (
    ARConfig,
    DiTConfig,
    EditConfig,
    ImageTokenConfig,
    SchedulerConfig,
    TATokConfig,
    VAEConfig,
    VAEStageConfig,
)

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
BLOCKS = ("ResBlock", "EfficientViTBlock")


def parse_ar(config: ConfigFile, shapes: Mapping[str, tuple[int, ...]]) -> ARConfig:
    """The decoder's geometry. `shapes` of the weights settle what older configuration files leave out."""
    architectures = config.data.get("architectures")
    if not isinstance(architectures, list) or not set(architectures) & set(ARCHITECTURES):
        raise config.error("architectures", " or ".join(ARCHITECTURES))
    config.choice("model_type", MODEL_TYPES)
    config.only("attention_bias", False)
    config.only("hidden_act", "silu")
    config.only("use_sliding_window", False)
    config.only("quantization_config", None)
    for kind in config.data.get("layer_types") or ():
        if kind != "full_attention":
            raise config.error("layer_types", '"full_attention" for every layer')
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    kv_heads = config.integer("num_key_value_heads")
    if heads % kv_heads:
        raise config.error("num_key_value_heads", f"a divisor of num_attention_heads, {heads}")
    query_norm = shapes.get(published_name("ar", "layers.0.self_attn.q_norm.weight"))
    head_dim = config.integer("head_dim", query_norm[0] if query_norm else hidden // heads)
    if head_dim % 2:
        raise config.error("head_dim", "an even number")
    return ARConfig(
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=config.integer("intermediate_size"),
        num_layers=config.layers("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=config.number("rms_norm_eps"),
        rope_theta=_rope_theta(config),
        max_position_embeddings=config.integer("max_position_embeddings"),
        tie_word_embeddings=config.boolean(
            "tie_word_embeddings", published_name("ar", "lm_head.weight") not in shapes
        ),
    )


def _rope_theta(config: ConfigFile) -> float:
    """rope_theta from the top level or from rope_parameters, where newer transformers writes it."""
    for key in ("rope_scaling", "rope_parameters"):
        rope = config.data.get(key)
        if rope is None:
            continue
        if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type", "default")) != "default":
            raise config.error(key, 'null or {"rope_type": "default"}')
    nested = config.data.get("rope_parameters")
    if config.data.get("rope_theta") is None and isinstance(nested, dict):
        return config.section("rope_parameters").number("rope_theta")
    return config.number("rope_theta")


def parse_image_tokens(config: ConfigFile, tokens_per_image: int) -> ImageTokenConfig:
    """Ids of the image tokens, all of which must lie inside the vocabulary."""
    vocabulary = config.integer("vocab_size")
    ids = {
        key: config.integer(key, minimum=0)
        for key in ("image_start_tag_id", "image_end_tag_id", "scale_start_token_id", "image_start_token_id")
    }
    for key, token in ids.items():
        if token >= vocabulary:
            raise config.error(key, f"an id below vocab_size, {vocabulary}")
    count = config.integer("num_image_tokens")
    if ids["image_start_token_id"] + count > vocabulary:
        raise config.error("num_image_tokens", f"as many ids as fit below vocab_size, {vocabulary}")
    return ImageTokenConfig(**ids, num_image_tokens=count, tokens_per_image=tokens_per_image)


def parse_edit(config: ConfigFile) -> EditConfig:
    """The editing flags; a flag that is missing is off."""
    config.only("only_use_und_image_vae_as_noise", False)
    return EditConfig(
        use_und_image_vae=config.boolean("use_und_image_vae", False),
        use_und_image_vae_as_noise=config.boolean("use_und_image_vae_as_noise", False),
        use_tar_siglip_features=config.boolean("use_tar_siglip_features", False),
    )


def parse_dit(config: ConfigFile) -> DiTConfig:
    """SANA's geometry, from a SanaTransformer2DModel configuration."""
    config.only("_class_name", "SanaTransformer2DModel")
    config.only("guidance_embeds", False)
    config.only("interpolation_scale", None)
    config.only("norm_elementwise_affine", False)
    if config.data.get("qk_norm") not in (None, "rms_norm_across_heads"):
        raise config.error("qk_norm", "null or 'rms_norm_across_heads'")
    heads, head_dim = config.integer("num_attention_heads"), config.integer("attention_head_dim")
    width = heads * head_dim
    if config.integer("cross_attention_dim", width) != width:
        raise config.error("cross_attention_dim", f"num_attention_heads * attention_head_dim, {width}")
    in_channels = config.integer("in_channels")
    return DiTConfig(
        in_channels=in_channels,
        out_channels=config.integer("out_channels", in_channels),
        num_layers=config.layers("num_layers"),
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


def parse_vae(config: ConfigFile) -> VAEConfig:
    """DC-AE's geometry, from an AutoencoderDC configuration."""
    config.only("_class_name", "AutoencoderDC")
    for key in ("latent_shift", "latents_mean", "latents_std"):
        config.only(key, None)
    config.only("decoder_conv_act_fn", "relu")
    vae = VAEConfig(
        image_channels=config.integer("in_channels", 3),
        latent_channels=config.integer("latent_channels"),
        attention_head_dim=config.integer("attention_head_dim", 32),
        encoder_stages=_stages(config, "encoder"),
        decoder_stages=_stages(config, "decoder"),
        downsample=config.choice("downsample_block_type", ("Conv", "pixel_unshuffle"), "pixel_unshuffle"),
        upsample=config.choice("upsample_block_type", ("interpolate", "pixel_shuffle"), "pixel_shuffle"),
        encoder_out_shortcut=config.boolean("encoder_out_shortcut", True),
        decoder_in_shortcut=config.boolean("decoder_in_shortcut", True),
        scaling_factor=config.number("scaling_factor"),
        shift_factor=config.number("shift_factor", 0.0, positive=False),
    )
    if vae.image_channels != 3:
        raise config.error("in_channels", "3, for RGB")
    if len(vae.encoder_stages) != len(vae.decoder_stages):
        raise config.error("decoder_block_out_channels", "as many stages as encoder_block_out_channels has")
    _check_shortcuts(config, vae)
    return vae


def _stages(config: ConfigFile, side: str) -> tuple[VAEStageConfig, ...]:
    key = f"{side}_block_out_channels"
    channels = config.data.get(key)
    if not isinstance(channels, list | tuple) or len(channels) < 2:
        raise config.error(key, "a list of at least two channel counts")
    count = len(channels)
    blocks = config.per_stage(f"{side}_block_types", count, "ResBlock")
    layers = config.per_stage(f"{side}_layers_per_block", count)
    scales = _multiscales(config, f"{side}_qkv_multiscales", count)
    if side == "decoder":
        _require_each(config, "decoder_norm_types", count, "rms_norm")
        _require_each(config, "decoder_act_fns", count, "silu")
    for index in range(count):
        if not _is_count(channels[index], 1):
            raise config.error(key, "positive integers")
        if blocks[index] not in BLOCKS:
            raise config.error(f"{side}_block_types", " or ".join(BLOCKS))
        if not _is_count(layers[index], 0 if index == 0 else 1) or layers[index] > MAX_LAYERS:
            raise config.error(f"{side}_layers_per_block", "positive integers (0 only for the first stage)")
    stages = zip(channels, blocks, layers, scales, strict=True)
    return tuple(VAEStageConfig(c, b, n, s if b == "EfficientViTBlock" else ()) for c, b, n, s in stages)


def _multiscales(config: ConfigFile, key: str, count: int) -> list[tuple[int, ...]]:
    accepted = f"a list of {count} lists of odd kernel sizes"
    value = config.data.get(key)
    if not isinstance(value, list | tuple) or len(value) != count:
        raise config.error(key, accepted)
    for kernels in value:
        if not isinstance(kernels, list | tuple) or not all(_is_count(k, 1) and k % 2 for k in kernels):
            raise config.error(key, accepted)
    return [tuple(kernels) for kernels in value]


def _require_each(config: ConfigFile, key: str, count: int, accepted: str) -> None:
    if any(value != accepted for value in config.per_stage(key, count, accepted)):
        raise config.error(key, repr(accepted))


def _is_count(value: Any, minimum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def _check_shortcuts(config: ConfigFile, vae: VAEConfig) -> None:
    """Shortcuts average or repeat channels, so neighbouring channel counts must divide."""
    for side, stages in (("encoder", vae.encoder_stages), ("decoder", vae.decoder_stages)):
        key = f"{side}_block_out_channels"
        for fine, coarse in pairwise(stages):
            if fine.layers > 0 and 4 * fine.channels % coarse.channels:
                raise config.error(key, "channel counts that divide 4 times their finer neighbour's")
            if vae.downsample == "pixel_unshuffle" and side == "encoder" and coarse.channels % 4:
                raise config.error(key, "multiples of 4, with downsample_block_type pixel_unshuffle")
        for stage in stages:
            if stage.block == "EfficientViTBlock" and stage.channels % vae.attention_head_dim:
                raise config.error(key, f"multiples of attention_head_dim, {vae.attention_head_dim}")
    if vae.encoder_out_shortcut and vae.encoder_stages[-1].channels % vae.latent_channels:
        raise config.error("latent_channels", f"a divisor of {vae.encoder_stages[-1].channels}")
    if vae.decoder_in_shortcut and vae.decoder_stages[-1].channels % vae.latent_channels:
        raise config.error("latent_channels", f"a divisor of {vae.decoder_stages[-1].channels}")


def parse_scheduler(config: ConfigFile) -> SchedulerConfig:
    """The Euler schedule. Whatever class the folder was written for, only these keys reach it: a `flow_shift`
    is another class's key and has no effect."""
    for key in SCHEDULER_SWITCHES:
        config.only(key, False)
    config.only("shift_terminal", None)
    return SchedulerConfig(
        num_train_timesteps=config.integer("num_train_timesteps", 1000),
        shift=config.number("shift", 1.0),
    )


def parse_ta_tok(settings: ConfigFile, vision: ConfigFile) -> TATokConfig:
    """TA-Tok's geometry, from its own settings and SigLIP's vision configuration (whose missing keys have the
    defaults of that architecture)."""
    vision.choice("model_type", ("siglip_vision_model",), "siglip_vision_model")
    vision.only("hidden_act", "gelu_pytorch_tanh")
    bottleneck = settings.section("bottleneck").section("args")
    bottleneck.only("norm", "none")
    regularizer = bottleneck.section("regularizer")
    regularizer.only("name", "simvq", required=True)
    codebook = regularizer.section("args")
    codebook.only("l2_normalized", True, required=True)
    settings.only("pool_scale", 1)
    config = TATokConfig(
        image_size=settings.integer("input_size", vision.integer("image_size", 224)),
        patch_size=vision.integer("patch_size", 16),
        image_channels=vision.integer("num_channels", 3),
        hidden_size=vision.integer("hidden_size", 768),
        intermediate_size=vision.integer("intermediate_size", 3072),
        num_layers=vision.layers("num_hidden_layers", 12),
        num_heads=vision.integer("num_attention_heads", 12),
        layer_norm_eps=vision.number("layer_norm_eps", 1e-6),
        selected_layer=_selected_layer(settings),
        bottleneck_dim=bottleneck.integer("bottleneck_dim"),
        codebook_size=codebook.integer("codebook_size"),
    )
    _check_ta_tok(settings, vision, config)
    return config


def _selected_layer(settings: ConfigFile) -> int:
    layer = settings.data.get("select_layer_id", -2)
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise settings.error("select_layer_id", "an integer, the hidden state to take")
    return layer


def _check_ta_tok(settings: ConfigFile, vision: ConfigFile, config: TATokConfig) -> None:
    if config.image_channels != 3:
        raise vision.error("num_channels", "3, for RGB")
    if config.hidden_size % config.num_heads:
        raise vision.error("num_attention_heads", f"a divisor of hidden_size, {config.hidden_size}")
    if config.image_size != vision.integer("image_size", 224):
        raise settings.error("input_size", f"SigLIP's image_size, {vision.data.get('image_size', 224)}")
    if not 0 <= config.layers_run <= config.num_layers:
        raise settings.error("select_layer_id", f"a hidden state of {config.num_layers} layers")
    if settings.integer("bottleneck_token_num", config.tokens) != config.tokens:
        raise settings.error(
            "bottleneck_token_num", f"SigLIP's {config.grid} x {config.grid} patches, {config.tokens}"
        )
