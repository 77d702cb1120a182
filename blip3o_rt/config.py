"""Configuration of a BLIP3o-NEXT model: frozen dataclasses read from a checkpoint, never hard-coded.

Every `check` raises ConfigError for numbers that make no such model. It names them as the published
configuration files do, whichever layout they were read from.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import pairwise
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from blip3o_rt.errors import ConfigError

MAX_LAYERS = 1000  # of which no known model has more
MAX_POSITIONS = 2**20
TOKEN_IDS = ("image_start_tag_id", "image_end_tag_id", "scale_start_token_id", "image_start_token_id")
SPREAD = 1e4  # between a factor and 1, which is wider than any known model's


def _require(holds: bool, key: str, value: object, accepted: str) -> None:
    if not holds:
        raise ConfigError(f"{key} is {value!r}; accepted: {accepted}")


def _require_within(key: str, value: float, low: float, high: float) -> None:
    _require(low <= value <= high, key, value, f"from {low:.12g} to {high:.12g}")


def _require_one_of(key: str, value: str, *accepted: str) -> None:
    _require(value in accepted, key, value, " or ".join(map(repr, accepted)))


def _require_epsilon(key: str, value: float) -> None:
    _require_within(key, value, 1e-12, 1e-2)


def _require_factor(key: str, value: float) -> None:
    _require_within(key, value, 1 / SPREAD, SPREAD)


@dataclass(frozen=True)
class ARConfig:
    """Qwen3 decoder. Query width is num_heads * head_dim, which need not equal hidden_size."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool

    @property
    def query_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    def check(self) -> None:
        """Raise ConfigError where the numbers do not make a Qwen3 decoder."""
        _require_within("num_hidden_layers", self.num_layers, 1, MAX_LAYERS)
        divides = self.num_heads % self.num_kv_heads == 0
        accepted = f"a divisor of num_attention_heads, {self.num_heads}"
        _require(divides, "num_key_value_heads", self.num_kv_heads, accepted)
        _require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "an even number")
        _require_epsilon("rms_norm_eps", self.rms_norm_eps)
        _require_within("rope_theta", self.rope_theta, 1, 1e12)
        _require_within("max_position_embeddings", self.max_position_embeddings, 1, MAX_POSITIONS)


@dataclass(frozen=True)
class ImageTokenConfig:
    """Where the discrete image tokens live in the vocabulary, and how many make one image."""

    image_start_tag_id: int
    image_end_tag_id: int
    scale_start_token_id: int
    image_start_token_id: int
    num_image_tokens: int
    tokens_per_image: int

    @property
    def image_token_range(self) -> range:
        """Vocabulary ids of the image tokens."""
        return range(self.image_start_token_id, self.image_start_token_id + self.num_image_tokens)


@dataclass(frozen=True)
class DiTConfig:
    """SANA diffusion transformer. Width is num_heads * head_dim."""

    in_channels: int
    out_channels: int
    num_layers: int
    num_heads: int
    head_dim: int
    num_cross_heads: int
    cross_head_dim: int
    caption_channels: int
    mlp_ratio: float
    patch_size: int
    sample_size: int
    attention_bias: bool
    qk_norm: bool
    norm_eps: float
    timestep_scale: float

    @property
    def width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def cross_width(self) -> int:
        return self.num_cross_heads * self.cross_head_dim

    @property
    def mlp_hidden(self) -> int:
        return int(self.mlp_ratio * self.width)

    def check(self) -> None:
        """Raise ConfigError where the numbers do not make a SANA transformer."""
        _require_within("num_layers", self.num_layers, 1, MAX_LAYERS)
        _require_factor("mlp_ratio", self.mlp_ratio)
        _require_epsilon("norm_eps", self.norm_eps)
        _require_factor("timestep_scale", self.timestep_scale)


@dataclass(frozen=True)
class VAEStageConfig:
    """One resolution of the DC-AE encoder or decoder."""

    channels: int
    block: str  # "ResBlock" or "EfficientViTBlock"
    layers: int
    multiscales: tuple[int, ...]  # depthwise kernel sizes of the multiscale attention


@dataclass(frozen=True)
class VAEConfig:
    """DC-AE. Stages go from full resolution to the latent's; each step halves height and width."""

    image_channels: int
    latent_channels: int
    attention_head_dim: int
    encoder_stages: tuple[VAEStageConfig, ...]
    decoder_stages: tuple[VAEStageConfig, ...]
    downsample: str  # "Conv" or "pixel_unshuffle"
    upsample: str  # "interpolate" or "pixel_shuffle"
    encoder_out_shortcut: bool
    decoder_in_shortcut: bool
    scaling_factor: float
    shift_factor: float

    @property
    def compression(self) -> int:
        """Pixels per latent cell along one side."""
        return 2 ** (len(self.decoder_stages) - 1)

    def check(self) -> None:
        """Raise ConfigError where the numbers do not make a DC-AE whose two halves fit each other."""
        _require(self.image_channels == 3, "in_channels", self.image_channels, "3, for RGB")
        _require_one_of("downsample_block_type", self.downsample, "Conv", "pixel_unshuffle")
        _require_one_of("upsample_block_type", self.upsample, "interpolate", "pixel_shuffle")
        _require_factor("scaling_factor", self.scaling_factor)
        _require_within("shift_factor", self.shift_factor, -SPREAD, SPREAD)
        _require(
            len(self.encoder_stages) == len(self.decoder_stages),
            "decoder_block_out_channels",
            [stage.channels for stage in self.decoder_stages],
            "as many stages as encoder_block_out_channels has",
        )
        self._check_half("encoder", self.encoder_stages, self.encoder_out_shortcut)
        self._check_half("decoder", self.decoder_stages, self.decoder_in_shortcut)

    def _check_half(self, half: str, stages: tuple[VAEStageConfig, ...], shortcut: bool) -> None:
        """Shortcuts average or repeat whole groups of channels; a pixel unshuffle makes channels in fours."""
        width_key, channels = f"{half}_block_out_channels", [stage.channels for stage in stages]
        _require(
            all(count.layers >= 1 for count in stages[1:-1]) and any(stage.layers for stage in stages),
            f"{half}_layers_per_block",
            [stage.layers for stage in stages],
            "positive integers (0 only for the first and the last stage of several)",
        )
        for stage in stages:
            _require_within(f"{half}_layers_per_block", stage.layers, 0, MAX_LAYERS)
            _require_one_of(f"{half}_block_types", stage.block, "ResBlock", "EfficientViTBlock")
            heads = stage.block != "EfficientViTBlock" or stage.channels >= self.attention_head_dim
            accepted = f"at least attention_head_dim, {self.attention_head_dim}, for EfficientViTBlock"
            _require(heads, width_key, channels, accepted)
            odd = all(kernel > 0 and kernel % 2 for kernel in stage.multiscales)
            _require(odd, f"{half}_qkv_multiscales", list(stage.multiscales), "odd kernel sizes")
        for fine, coarse in pairwise(stages):
            divides = fine.layers == 0 or 4 * fine.channels % coarse.channels == 0
            _require(divides, width_key, channels, "counts that divide 4 times their finer neighbor's")
            fours = (half, self.downsample) != ("encoder", "pixel_unshuffle") or coarse.channels % 4 == 0
            _require(fours, width_key, channels, "multiples of 4, with downsample_block_type pixel_unshuffle")
        latent, coarsest = self.latent_channels, stages[-1].channels
        _require(
            not shortcut or coarsest % latent == 0, "latent_channels", latent, f"a divisor of {coarsest}"
        )


@dataclass(frozen=True)
class TATokConfig:
    """SigLIP vision tower and cosine codebook that turn an image into discrete tokens."""

    image_size: int
    patch_size: int
    image_channels: int
    hidden_size: int
    intermediate_size: int
    num_layers: int  # of the published tower; only those up to selected_layer run
    num_heads: int
    layer_norm_eps: float
    selected_layer: int  # index into the hidden states, e.g. -2
    bottleneck_dim: int
    codebook_size: int

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        return self.grid * self.grid

    @property
    def layers_run(self) -> int:
        """Encoder layers needed for the selected hidden state (hidden state 0 is the embedding)."""
        states = self.num_layers + 1
        return self.selected_layer if self.selected_layer >= 0 else states + self.selected_layer

    def check(self) -> None:
        """Raise ConfigError where the numbers do not make a SigLIP tower."""
        _require_within("num_hidden_layers", self.num_layers, 1, MAX_LAYERS)
        divides = self.hidden_size % self.num_heads == 0
        accepted = f"a divisor of hidden_size, {self.hidden_size}"
        _require(divides, "num_attention_heads", self.num_heads, accepted)
        _require_epsilon("layer_norm_eps", self.layer_norm_eps)
        runs = 0 <= self.layers_run <= self.num_layers
        accepted = f"a hidden state of {self.num_layers} layers, {-self.num_layers - 1} to {self.num_layers}"
        _require(runs, "select_layer_id", self.selected_layer, accepted)
        fits = self.patch_size <= self.image_size
        _require(fits, "patch_size", self.patch_size, f"at most image_size, {self.image_size}")


@dataclass(frozen=True)
class SchedulerConfig:
    """Flow-matching Euler schedule; shift 1 leaves the sigmas evenly spaced."""

    num_train_timesteps: int = 1000
    shift: float = 1.0

    def check(self) -> None:
        """Raise ConfigError where the numbers leave no schedule."""
        _require_within("num_train_timesteps", self.num_train_timesteps, 1, 10**6)
        _require_within("shift", self.shift, 0.01, 100)


@dataclass(frozen=True)
class EditConfig:
    """Which ways of looking at a reference image the checkpoint was trained with, as its config.json says."""

    use_und_image_vae: bool = False
    use_und_image_vae_as_noise: bool = False
    use_tar_siglip_features: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """The whole model; ta_tok is None where the checkpoint has no vision tower (text-to-image only)."""

    ar: ARConfig
    image_tokens: ImageTokenConfig
    dit: DiTConfig
    vae: VAEConfig
    scheduler: SchedulerConfig
    edit: EditConfig
    ta_tok: TATokConfig | None

    @property
    def image_size(self) -> int:
        """Side of a generated image in pixels."""
        return self.dit.sample_size * self.vae.compression

    def check(self) -> None:
        """Raise ConfigError where the parts do not fit each other; the parts check themselves."""
        tokens, vocabulary = self.image_tokens, self.ar.vocab_size
        for key in TOKEN_IDS:
            token = getattr(tokens, key)
            _require(0 <= token < vocabulary, key, token, f"an id below vocab_size, {vocabulary}")
        fits = tokens.image_token_range.stop <= vocabulary
        accepted = f"as many ids as fit below vocab_size, {vocabulary}"
        _require(fits, "num_image_tokens", tokens.num_image_tokens, accepted)
        codes = self.ta_tok.codebook_size if self.ta_tok else tokens.num_image_tokens
        accepted = f"the image tokenizer's codebook_size, {codes}"
        _require(tokens.num_image_tokens == codes, "num_image_tokens", tokens.num_image_tokens, accepted)
        count, positions = tokens.tokens_per_image, self.ar.max_position_embeddings
        accepted = f"more than the {count} tokens of an image, of which there is at least one"
        _require(0 < count < positions, "max_position_embeddings", positions, accepted)
        latent, dit = self.vae.latent_channels, self.dit
        noisy = [latent, 2 * latent] if self.edit.use_und_image_vae_as_noise else [latent]
        _require(
            dit.in_channels in noisy,
            "in_channels",
            dit.in_channels,
            f"{' or '.join(map(str, noisy))}, from the autoencoder's {latent} latent channels (twice that "
            "only with use_und_image_vae_as_noise)",
        )
        fits = dit.sample_size % dit.patch_size == 0
        _require(fits, "sample_size", dit.sample_size, f"a multiple of patch_size, {dit.patch_size}")
        fits = dit.out_channels in (latent, dit.in_channels)
        _require(fits, "out_channels", dit.out_channels, f"{latent} or {dit.in_channels}")

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelConfig:
        """Inverse of dataclasses.asdict.

        Raises:
            ConfigError: Numbers that make no model.
            TypeError, AttributeError, ArithmeticError: A dictionary of another layout.
        """
        model: ModelConfig = _typed("config", cls, data)
        for part in (model.ar, model.dit, model.vae, model.scheduler, model.ta_tok):
            if part is not None:
                part.check()
        model.check()
        return model


def _typed(name: str, kind: Any, data: Any) -> Any:
    """Plain data as a value of a type: a dataclass, a tuple, a number, a text, or None. Raises TypeError."""
    if dataclasses.is_dataclass(kind):
        kinds = get_type_hints(kind)
        values = {key: _typed(key, kinds[key], data[key]) if key in kinds else data[key] for key in data}
        return kind(**values)  # type: ignore[operator]
    if get_origin(kind) is tuple:
        return tuple(_typed(name, get_args(kind)[0], value) for value in data)
    if get_origin(kind) is UnionType:
        return None if data is None else _typed(name, get_args(kind)[0], data)
    if type(data) is not kind:
        raise TypeError(f"{name} is of type {type(data).__name__}")
    return data
