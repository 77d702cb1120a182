"""Layouts against the modules of diffusers and transformers: the same original names, the same shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen3Config, Qwen3ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from blip3o_rt.ar.layout import layout as ar_layout
from blip3o_rt.checkpoint.parts import weight_bytes
from blip3o_rt.checkpoint.published_config import ConfigFile, parse_dit, parse_vae
from blip3o_rt.checkpoint.source import KNOWN_SANA
from blip3o_rt.config import ARConfig, TATokConfig
from blip3o_rt.dit.layout import layout as dit_layout
from blip3o_rt.measure.random_checkpoint import preset
from blip3o_rt.tatok.layout import layout as ta_tok_layout
from blip3o_rt.vae.layout import layout as vae_layout
from blip3o_rt.weights import TensorSpec

Shapes = dict[str, tuple[int, ...]]
FEW = settings(max_examples=12, deadline=None, derandomize=True)


def original_shapes(specs: list[TensorSpec]) -> Shapes:
    """Every source of a layout; each is used once."""
    shapes: Shapes = {}
    for spec in specs:
        for source in spec.sources:
            assert source.name not in shapes
            shapes[source.name] = source.shape
        elements = sum(torch.Size(source.shape).numel() for source in spec.sources)
        assert spec.name == "codebook" or torch.Size(spec.shape).numel() == elements
    return shapes


def module_shapes(build: Any, config: Any) -> Shapes:
    """The state dictionary's shapes of a module built without memory for its weights."""
    with torch.device("meta"):
        module = build(config)
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


@FEW
@given(
    heads=st.sampled_from([(1, 1), (4, 2), (6, 2)]),
    head_dim=st.sampled_from([16, 32]),
    hidden=st.sampled_from([32, 48]),
    layers=st.integers(1, 3),
    tied=st.booleans(),
)
def test_decoder_matches_qwen3(
    heads: tuple[int, int], head_dim: int, hidden: int, layers: int, tied: bool
) -> None:
    config = ARConfig(97, hidden, 80, layers, *heads, head_dim, 1e-6, 1e6, 64, tied)
    oracle = Qwen3Config(
        vocab_size=97,
        hidden_size=hidden,
        intermediate_size=80,
        num_hidden_layers=layers,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        head_dim=head_dim,
        tie_word_embeddings=tied,
    )
    expected = module_shapes(Qwen3ForCausalLM, oracle)
    expected = {name.removeprefix("model."): shape for name, shape in expected.items()}
    if tied:
        expected.pop("lm_head.weight")
    assert original_shapes(ar_layout(config)) == expected


@FEW
@given(
    heads=st.integers(1, 3),
    cross=st.sampled_from([(1, 16), (2, 24)]),
    patch=st.sampled_from([1, 2]),
    bias=st.booleans(),
    qk_norm=st.booleans(),
    channels=st.sampled_from([(4, 4), (8, 4), (8, 8)]),
)
def test_dit_matches_sana(
    heads: int, cross: tuple[int, int], patch: int, bias: bool, qk_norm: bool, channels: tuple[int, int]
) -> None:
    keys = {
        "in_channels": channels[0],
        "out_channels": channels[1],
        "num_attention_heads": heads,
        "attention_head_dim": 16,
        "num_layers": 2,
        "num_cross_attention_heads": cross[0],
        "cross_attention_head_dim": cross[1],
        "cross_attention_dim": 16 * heads,
        "caption_channels": 40,
        "mlp_ratio": 2.5,
        "attention_bias": bias,
        "sample_size": 4,
        "patch_size": patch,
        "qk_norm": "rms_norm_across_heads" if qk_norm else None,
    }
    expected = module_shapes(lambda config: SanaTransformer2DModel(**config), keys)
    assert original_shapes(dit_layout(parse_dit(ConfigFile("test", keys), {}))) == expected


VAE_KEYS: dict[str, Any] = {
    "latent_channels": 8,
    "attention_head_dim": 16,
    "encoder_block_types": ["ResBlock", "EfficientViTBlock", "EfficientViTBlock"],
    "decoder_block_types": ["ResBlock", "EfficientViTBlock", "EfficientViTBlock"],
    "encoder_block_out_channels": [16, 32, 32],
    "decoder_block_out_channels": [16, 32, 64],
    "encoder_qkv_multiscales": [[], [5], [3, 5]],
    "decoder_qkv_multiscales": [[], [], [5]],
    "encoder_layers_per_block": [1, 2, 1],
    "decoder_layers_per_block": [2, 1, 1],
    "scaling_factor": 0.5,
}


@FEW
@given(
    resampling=st.sampled_from([("Conv", "interpolate"), ("pixel_unshuffle", "pixel_shuffle")]),
    first=st.tuples(st.sampled_from([0, 1]), st.sampled_from([0, 2])),
    plain=st.booleans(),
)
def test_vae_matches_dc_ae(resampling: tuple[str, str], first: tuple[int, int], plain: bool) -> None:
    keys = {
        **VAE_KEYS,
        "downsample_block_type": resampling[0],
        "upsample_block_type": resampling[1],
        "encoder_layers_per_block": [first[0], 2, 1],
        "decoder_layers_per_block": [first[1], 1, 2],
    }
    if plain:
        keys |= {"encoder_block_types": "ResBlock", "decoder_block_types": "ResBlock"}
    expected = module_shapes(lambda config: AutoencoderDC(**config), keys)
    assert original_shapes(vae_layout(parse_vae(ConfigFile("test", keys)))) == expected


@FEW
@given(
    layers=st.integers(1, 3), selected=st.sampled_from([-1, -2, 1]), size=st.sampled_from([(16, 8), (30, 7)])
)
def test_ta_tok_matches_siglip(layers: int, selected: int, size: tuple[int, int]) -> None:
    config = TATokConfig(*size, 3, 32, 48, layers, 2, 1e-6, selected, 12, 40)
    oracle = SiglipVisionConfig(
        image_size=size[0],
        patch_size=size[1],
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=2,
    )
    tower = {
        "encoder." + name.removeprefix("vision_model."): shape
        for name, shape in module_shapes(SiglipVisionModel, oracle).items()
    }
    shapes = original_shapes(ta_tok_layout(config))
    siglip = {name: shape for name, shape in shapes.items() if name.startswith("encoder.")}
    assert siglip.items() <= tower.items()
    unused = sorted(set(tower) - set(siglip))
    beyond = tuple(f"encoder.encoder.layers.{index}." for index in range(config.layers_run, layers))
    assert all(name.startswith(("encoder.post_layernorm", "encoder.head", *beyond)) for name in unused)
    assert set(shapes) - set(siglip) == {
        "encode_task_layer.0.weight",
        "encode_task_layer.0.bias",
        "bottleneck.in_linear.weight",
        "bottleneck.in_linear.bias",
        "bottleneck.regularizer.embedding.weight",
        "bottleneck.regularizer.embedding_proj.weight",
        "bottleneck.regularizer.embedding_proj.bias",
    }


def test_published_sana_and_dc_ae_match_the_modules() -> None:
    model = preset("published")
    for component, build, specs in (
        ("transformer", SanaTransformer2DModel, dit_layout(model.dit)),
        ("vae", AutoencoderDC, vae_layout(model.vae)),
    ):
        keys = ConfigFile.read(KNOWN_SANA / component / "config.json").data
        known = {name: value for name, value in keys.items() if not name.startswith("_")}
        assert original_shapes(specs) == module_shapes(lambda config, build=build: build(**config), known)


def test_published_sizes() -> None:
    sizes = weight_bytes(preset("published"), torch.bfloat16)
    assert sizes["ar"] == pytest.approx(2.82e9 + 0.89e9, rel=0.01)  # layers, and the tied head
    assert sizes["dit"] == pytest.approx(2 * 1.6e9, rel=0.02)
