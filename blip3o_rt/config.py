"""Geometry of a BLIP3o-NEXT model: frozen dataclasses read from a checkpoint, never hard-coded."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


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


@dataclass(frozen=True)
class SchedulerConfig:
    """Flow-matching Euler schedule; shift 1 leaves the sigmas evenly spaced."""

    num_train_timesteps: int = 1000
    shift: float = 1.0


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
        """Side of a generated picture in pixels."""
        return self.dit.sample_size * self.vae.compression

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready dictionary; from_dict reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelConfig:
        """Inverse of to_dict. Raises KeyError or TypeError on a dictionary of another layout."""

        def stages(entries: list[dict[str, Any]]) -> tuple[VAEStageConfig, ...]:
            return tuple(VAEStageConfig(**{**e, "multiscales": tuple(e["multiscales"])}) for e in entries)

        vae = dict(data["vae"])
        vae["encoder_stages"] = stages(vae["encoder_stages"])
        vae["decoder_stages"] = stages(vae["decoder_stages"])
        return cls(
            ar=ARConfig(**data["ar"]),
            image_tokens=ImageTokenConfig(**data["image_tokens"]),
            dit=DiTConfig(**data["dit"]),
            vae=VAEConfig(**vae),
            scheduler=SchedulerConfig(**data["scheduler"]),
            edit=EditConfig(**data["edit"]),
            ta_tok=TATokConfig(**data["ta_tok"]) if data["ta_tok"] is not None else None,
        )
