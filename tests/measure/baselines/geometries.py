"""Small models of other geometries than the published one: nothing may depend on the published numbers."""

from __future__ import annotations

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
from blip3o_rt.measure.random_tokenizer import SPECIAL_TOKENS

FIRST_TAG = 256 + len(SPECIAL_TOKENS)  # bytes and special tokens come before the image vocabulary


def image_tokens(codes: int, per_image: int) -> ImageTokenConfig:
    return ImageTokenConfig(
        image_start_tag_id=FIRST_TAG,
        image_end_tag_id=FIRST_TAG + 1,
        scale_start_token_id=FIRST_TAG + 2,
        image_start_token_id=FIRST_TAG + 5,
        num_image_tokens=codes,
        tokens_per_image=per_image,
    )


def tied_head(edit: EditConfig) -> ModelConfig:
    """A tied head narrower than its queries, a 5 x 5 token grid, a 6 x 6 latent, a shifted schedule.

    The autoencoder shuffles pixels, has two layers a stage in the decoder and two attention scales.
    """
    codes = 100
    encoder = (
        VAEStageConfig(16, "ResBlock", 1, ()),
        VAEStageConfig(32, "EfficientViTBlock", 2, (3, 5)),
        VAEStageConfig(32, "EfficientViTBlock", 1, ()),
    )
    decoder = (
        VAEStageConfig(8, "ResBlock", 2, ()),
        VAEStageConfig(16, "ResBlock", 2, ()),
        VAEStageConfig(64, "EfficientViTBlock", 2, (3, 5)),
    )
    return ModelConfig(
        ar=ARConfig(
            vocab_size=FIRST_TAG + 5 + codes,
            hidden_size=48,
            intermediate_size=80,
            num_layers=3,
            num_heads=4,
            num_kv_heads=1,
            head_dim=32,
            rms_norm_eps=1e-5,
            rope_theta=1e4,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
        ),
        image_tokens=image_tokens(codes, 25),
        dit=DiTConfig(
            in_channels=8,
            out_channels=8,
            num_layers=3,
            num_heads=3,
            head_dim=16,
            num_cross_heads=3,
            cross_head_dim=20,
            caption_channels=40,
            mlp_ratio=2.0,
            patch_size=1,
            sample_size=6,
            attention_bias=False,
            qk_norm=True,
            norm_eps=1e-6,
            timestep_scale=1.0,
        ),
        vae=VAEConfig(
            image_channels=3,
            latent_channels=8,
            attention_head_dim=16,
            encoder_stages=encoder,
            decoder_stages=decoder,
            downsample="pixel_unshuffle",
            upsample="pixel_shuffle",
            encoder_out_shortcut=True,
            decoder_in_shortcut=True,
            scaling_factor=0.7,
            shift_factor=0.0,
        ),
        scheduler=SchedulerConfig(num_train_timesteps=1000, shift=3.0),
        edit=edit,
        ta_tok=TATokConfig(
            image_size=40,
            patch_size=8,
            image_channels=3,
            hidden_size=48,
            intermediate_size=56,
            num_layers=4,
            num_heads=3,
            layer_norm_eps=1e-6,
            selected_layer=-3,
            bottleneck_dim=24,
            codebook_size=codes,
        ),
    )


def large_patches(edit: EditConfig) -> ModelConfig:
    """DiT patches of 2 x 2 with biases, without query and key norms; as many key as query heads.

    A latent of 4 x 4 takes the autoencoder's quadratic attention. The DiT has 2 C input channels, C output.
    """
    codes = 300
    stages = (
        VAEStageConfig(8, "ResBlock", 1, ()),
        VAEStageConfig(16, "ResBlock", 1, ()),
        VAEStageConfig(32, "EfficientViTBlock", 1, (5,)),
        VAEStageConfig(64, "EfficientViTBlock", 1, (5,)),
    )
    return ModelConfig(
        ar=ARConfig(
            vocab_size=FIRST_TAG + 5 + codes + 7,
            hidden_size=64,
            intermediate_size=96,
            num_layers=1,
            num_heads=2,
            num_kv_heads=2,
            head_dim=16,
            rms_norm_eps=1e-6,
            rope_theta=1e6,
            max_position_embeddings=512,
            tie_word_embeddings=False,
        ),
        image_tokens=image_tokens(codes, 9),
        dit=DiTConfig(
            in_channels=32,
            out_channels=16,
            num_layers=1,
            num_heads=2,
            head_dim=32,
            num_cross_heads=4,
            cross_head_dim=16,
            caption_channels=56,
            mlp_ratio=2.5,
            patch_size=2,
            sample_size=4,
            attention_bias=True,
            qk_norm=False,
            norm_eps=1e-6,
            timestep_scale=1.0,
        ),
        vae=VAEConfig(
            image_channels=3,
            latent_channels=16,
            attention_head_dim=32,
            encoder_stages=stages,
            decoder_stages=stages,
            downsample="Conv",
            upsample="interpolate",
            encoder_out_shortcut=True,
            decoder_in_shortcut=True,
            scaling_factor=0.41407,
            shift_factor=0.0,
        ),
        scheduler=SchedulerConfig(),
        edit=edit,
        ta_tok=TATokConfig(
            image_size=50,  # not a multiple of the patch: the rest is left out
            patch_size=16,
            image_channels=3,
            hidden_size=32,
            intermediate_size=40,
            num_layers=2,
            num_heads=1,
            layer_norm_eps=1e-5,
            selected_layer=-2,
            bottleneck_dim=16,
            codebook_size=codes,
        ),
    )
