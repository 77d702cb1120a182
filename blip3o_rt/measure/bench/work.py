"""How much every stage must read and compute, counted from the model's geometry.

Bytes are the least that a call reads from memory: weights once, and the key/value cache where there is one.
FLOPs are two per multiply-add of the matrix products, convolutions and attentions; what is linear in the
activations alone (norms, activations, sums) is not counted.

Two counts where the runtime does less than the published way: `shortened` leaves out what no step changes and
what both branches share (dit), and what nearest-neighbor upsampling repeats (vae).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from blip3o_rt.checkpoint.parts import layouts
from blip3o_rt.config import ARConfig, DiTConfig, ModelConfig, TATokConfig, VAEConfig, VAEStageConfig
from blip3o_rt.dit.layout import TIMESTEP_FEATURES
from blip3o_rt.vae.layout import GATED_EXPANSION

FLOPS_PER_PRODUCT = 2  # a multiplication and an addition
ONCE_PER_SCHEDULE = "time_embed."
ONCE_PER_IMAGE = ("caption_projection.", "caption_norm.", ".attn2.to_kv.", ".attn2.norm_k.")


@dataclass(frozen=True)
class Work:
    """What one call must do: bytes read and floating-point operations."""

    bytes: int
    flops: int

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.flops + other.flops)

    def __mul__(self, times: int) -> Work:
        return Work(self.bytes * times, self.flops * times)


# The autoregressive stage


def ar_layer_weights(config: ARConfig) -> int:
    """Elements of all matrices of the decoder's layers: what every token reads whatever it is."""
    attention = config.hidden_size * (2 * config.query_size + 2 * config.kv_size)
    return config.num_layers * (attention + 3 * config.hidden_size * config.intermediate_size)


def ar_token(
    config: ARConfig,
    itemsize: int,
    *,
    batch: int,
    context: int,
    head_rows: int,
    weight_itemsize: int | None = None,
) -> Work:
    """One decoded token of each of `batch` sequences, each attending to `context` positions.

    head_rows: rows of the head that make its logits. weight_itemsize: of the matrices, where they are
    quantized.
    """
    weights = ar_layer_weights(config) + head_rows * config.hidden_size
    cache = batch * context * 2 * config.num_layers * config.kv_size
    attention = batch * context * 2 * config.num_layers * config.query_size
    moved = (weight_itemsize or itemsize) * weights + itemsize * cache
    return Work(moved, FLOPS_PER_PRODUCT * (batch * weights + attention))


def ar_prefill(config: ARConfig, itemsize: int, *, length: int) -> Work:
    """A prompt of `length` tokens in one pass, causal, without the head."""
    weights = ar_layer_weights(config)
    pairs = length * (length + 1) // 2
    attention = pairs * 2 * config.num_layers * config.query_size
    return Work(itemsize * weights, FLOPS_PER_PRODUCT * (length * weights + attention))


# The diffusion stage


def connector(config: ModelConfig, itemsize: int, *, tokens: int) -> Work:
    """The diffusion connector on `tokens` hidden states."""
    hidden, caption = config.ar.hidden_size, config.dit.caption_channels
    weights = hidden * caption + caption**2
    return Work(itemsize * weights, FLOPS_PER_PRODUCT * tokens * weights)


def dit_condition(config: DiTConfig, itemsize: int, *, tokens: int) -> Work:
    """Caption projection, and keys and values of all layers, of `tokens` condition tokens."""
    weights = config.caption_channels * config.width + config.width**2
    weights += config.num_layers * 2 * config.width * config.cross_width
    return Work(itemsize * weights, FLOPS_PER_PRODUCT * tokens * weights)


def dit_tables(config: DiTConfig, itemsize: int, *, steps: int) -> Work:
    """Time embedding and modulation vectors of a schedule."""
    weights = TIMESTEP_FEATURES * config.width + 7 * config.width**2
    return Work(itemsize * weights, FLOPS_PER_PRODUCT * steps * weights)


@dataclass(frozen=True)
class StepShape:
    """What a denoising step has before it: image tokens, and tokens of the condition.

    counts: how many of the unconditional branch's tokens are identical, for each distinct one.
    """

    tokens: int
    counts: tuple[int, ...]

    @property
    def condition(self) -> int:
        return sum(self.counts)


def step_shape(config: ModelConfig, *, edit: bool = False) -> StepShape:
    """Of text-to-image, or of an edit in the ways that the checkpoint looks at its reference."""
    dit, counts = config.dit, (config.image_tokens.tokens_per_image + 1,)
    tokens = (dit.sample_size // dit.patch_size) ** 2
    if not edit:
        return StepShape(tokens, counts)
    columns = config.edit.use_und_image_vae_as_noise and dit.in_channels == config.vae.latent_channels
    cells = (dit.sample_size**2,) if config.edit.use_und_image_vae else ()
    return StepShape(2 * tokens if columns else tokens, (*counts, *cells))


def dit_step(config: ModelConfig, itemsize: int, *, shortened: bool, edit: bool = False) -> Work:
    """One step with classifier-free guidance: both branches through the transformer.

    shortened: time embedding and condition were computed before, and so was the unconditional cross-attention
    where its tokens are all the same, or it attends to each distinct one once; the patch embedding and the
    first self-attention, before which the branches are the same, are computed once.
    """
    dit, shape = config.dit, step_shape(config, edit=edit)
    patch = shape.tokens * dit.width * dit.patch_size**2  # of a channel
    embedding, projection = patch * dit.in_channels, patch * dit.out_channels
    attention = shape.tokens * _self_attention_products(dit)
    block = attention + shape.tokens * _feed_forward_products(dit)
    cross = shape.tokens * _cross_attention_products(dit, shape.condition)
    if shortened:
        distinct = len(shape.counts)
        null = shape.tokens * _cross_attention_products(dit, distinct) if distinct > 1 else 0
        products = embedding + 2 * projection + dit.num_layers * (2 * block + cross + null) - attention
        skipped: tuple[str, ...] = (ONCE_PER_SCHEDULE, *ONCE_PER_IMAGE)
        return Work(_part_bytes(config, "dit", itemsize, skipped), FLOPS_PER_PRODUCT * products)
    half = Work(0, FLOPS_PER_PRODUCT * (embedding + projection + dit.num_layers * (block + cross)))
    half += dit_condition(dit, 0, tokens=shape.condition) + dit_tables(dit, 0, steps=1)
    return half * 2 + Work(_part_bytes(config, "dit", itemsize), 0)


def _cross_attention_products(config: DiTConfig, keys: int) -> int:
    """Products per image token of a block's cross-attention to so many keys, which were computed before."""
    return 2 * config.width * config.cross_width + 2 * keys * config.cross_width


def _self_attention_products(config: DiTConfig) -> int:
    """Products per image token of a block's self-attention."""
    return 4 * config.width**2 + config.num_heads * _linear_attention_products(config.head_dim)


def _feed_forward_products(config: DiTConfig) -> int:
    """Products per image token of a block's feed-forward layer."""
    return 3 * config.width * config.mlp_hidden + 9 * 2 * config.mlp_hidden


def _linear_attention_products(head_dim: int) -> int:
    """Per token and head: adding to the state [head_dim + 1, head_dim], and its product with the query."""
    return 2 * (head_dim + 1) * head_dim


# The autoencoder


def vae_decode(config: ModelConfig, itemsize: int, *, shortened: bool) -> Work:
    """A latent to an image. shortened: upsampling and convolution are one transposed convolution."""
    vae, stages = config.vae, config.vae.decoder_stages
    sides = [config.image_size >> index for index in range(len(stages))]
    products = _convolution(sides[-1], vae.latent_channels, stages[-1].channels)
    products += _stages(vae, stages, sides)
    for (fine, coarse), side in zip(pairwise(stages), sides, strict=False):
        out = fine.channels if fine.layers else vae.image_channels
        products += _upsampling(vae, side, coarse.channels, out, shortened)
    if stages[0].layers:
        products += _convolution(sides[0], stages[0].channels, vae.image_channels)
    return Work(_half_bytes(config, "decoder.", itemsize), FLOPS_PER_PRODUCT * products)


def vae_encode(config: ModelConfig, itemsize: int) -> Work:
    """An image to a latent."""
    vae, stages = config.vae, config.vae.encoder_stages
    sides = [config.image_size >> index for index in range(len(stages))]
    products = _convolution(sides[-1], stages[-1].channels, vae.latent_channels)
    products += _stages(vae, stages, sides)
    for (fine, coarse), side in zip(pairwise(stages), sides, strict=False):
        channels = fine.channels if fine.layers else vae.image_channels
        out = coarse.channels // 4 if vae.downsample == "pixel_unshuffle" else coarse.channels
        products += _convolution(side if vae.downsample == "pixel_unshuffle" else side // 2, channels, out)
    if stages[0].layers:
        products += _convolution(sides[0], vae.image_channels, stages[0].channels)
    return Work(_half_bytes(config, "encoder.", itemsize), FLOPS_PER_PRODUCT * products)


def _convolution(side: int, channels_in: int, channels_out: int) -> int:
    """Products of a 3x3 convolution with `side`^2 results."""
    return 9 * side**2 * channels_in * channels_out


def _upsampling(config: VAEConfig, side: int, channels_in: int, channels_out: int, shortened: bool) -> int:
    """Products of doubling an image to `side`: of nine taps on a doubled image four meet distinct pixels."""
    if config.upsample == "pixel_shuffle":
        return _convolution(side // 2, channels_in, 4 * channels_out)
    return _convolution(side, channels_in, channels_out) * (4 if shortened else 9) // 9


def _stages(config: VAEConfig, stages: tuple[VAEStageConfig, ...], sides: list[int]) -> int:
    return sum(stage.layers * _block(config, stage, side) for stage, side in zip(stages, sides, strict=True))


def _block(config: VAEConfig, stage: VAEStageConfig, side: int) -> int:
    channels, pixels = stage.channels, side**2
    if stage.block == "ResBlock":
        return 2 * _convolution(side, channels, channels)
    head_dim = config.attention_head_dim
    heads = channels // head_dim
    qkv, scales = 3 * heads * head_dim, 1 + len(stage.multiscales)
    attention = channels * qkv + scales * heads * (_linear_attention_products(head_dim) + head_dim * channels)
    attention += sum(qkv * kernel**2 + qkv * head_dim for kernel in stage.multiscales)
    hidden = GATED_EXPANSION * channels
    return pixels * (attention + 3 * channels * hidden + 9 * 2 * hidden)


# The image tokenizer


def tatok_encode(config: ModelConfig, itemsize: int) -> Work:
    """An image to codes: the vision tower's layers in use, and the nearest of all codes for each token."""
    tower = config.ta_tok
    if tower is None:
        return Work(0, 0)
    tokens, hidden = tower.tokens, tower.hidden_size
    patch = tower.image_channels * tower.patch_size**2
    layer = 4 * hidden**2 + 2 * hidden * tower.intermediate_size + 2 * tokens * hidden
    ends = patch * hidden + hidden**2 + hidden * tower.bottleneck_dim
    codes = tower.codebook_size * tower.bottleneck_dim
    products = tokens * (tower.layers_run * layer + ends + codes)
    return Work(_tower_bytes(config, tower, itemsize), FLOPS_PER_PRODUCT * products)


def _tower_bytes(config: ModelConfig, tower: TATokConfig, itemsize: int) -> int:
    codebook = tower.codebook_size * tower.bottleneck_dim * 4  # float32 in every checkpoint
    return _part_bytes(config, "ta_tok", itemsize, ("codebook",)) + codebook


def _part_bytes(config: ModelConfig, part: str, itemsize: int, without: tuple[str, ...] = ()) -> int:
    """Bytes of a part's weights, but for those whose names contain one of `without`."""
    return itemsize * sum(
        math.prod(spec.shape)
        for spec in layouts(config)[part]
        if not any(text in spec.name for text in without)
    )


def _half_bytes(config: ModelConfig, prefix: str, itemsize: int) -> int:
    return itemsize * sum(
        math.prod(spec.shape) for spec in layouts(config)["vae"] if spec.name.startswith(prefix)
    )
