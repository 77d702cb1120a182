"""The same weights as modules of transformers and diffusers: views of the runtime's tensors where it can be.

What the layouts only put one after another (the decoder, the diffusion transformer, the vision tower) is
shared, so a baseline takes no memory of its own. What they rearrange (the autoencoder) is copied into the
order and the memory format that diffusers loads it in.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from blip3o_rt.ar.layout import layout as ar_layout
from blip3o_rt.config import ARConfig, DiTConfig, ModelConfig, SchedulerConfig, TATokConfig, VAEConfig
from blip3o_rt.connector.layout import layout as connector_layout
from blip3o_rt.connector.model import NORM_EPS
from blip3o_rt.dit.layout import layout as dit_layout
from blip3o_rt.measure.random_checkpoint import language_config, transformer_config, vae_config, vision_config
from blip3o_rt.tatok.layout import layout as ta_tok_layout
from blip3o_rt.vae.layout import layout as vae_layout
from blip3o_rt.weights import SCALE, TensorSpec, concatenate_rows

Weights = Mapping[str, Tensor]


def missing_package(name: str) -> str | None:
    """None where a baseline's package can be imported, else why not and what to do."""
    try:
        importlib.import_module(name)
    except ImportError as error:
        return f"{name} cannot be imported ({error}): pip install 'blip3o_rt[bench]'"
    return None


def dequantized(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The runtime tensors with 8-bit matrices as the numbers they stand for, in the dtype of the others."""
    kept = {name: tensor for name, tensor in weights.items() if not name.endswith(SCALE)}
    dtype = next(t.dtype for name, t in kept.items() if t.is_floating_point() and name + SCALE not in weights)
    return {
        name: (tensor.float() * weights[name + SCALE][:, None]).to(dtype)
        if name + SCALE in weights
        else tensor
        for name, tensor in kept.items()
    }


def original_tensors(specs: Sequence[TensorSpec], weights: Weights) -> dict[str, Tensor]:
    """The tensors of the published layout, by name, that the runtime's tensors were made from.

    Views where the sources were only concatenated or reshaped; copies where their elements were rearranged.
    Tensors that were computed (the codebook) are left out.
    """
    found: dict[str, Tensor] = {}
    for spec in specs:
        if spec.dtype is not None:
            continue
        tensor = weights[spec.name]
        if spec.combine is not concatenate_rows:
            tensor = _arranged_as_before(spec, tensor)
        counts = [math.prod(source.shape) for source in spec.sources]
        for source, piece in zip(spec.sources, tensor.reshape(-1).split(counts), strict=True):
            found[source.name] = piece.view(source.shape)
    return found


def _arranged_as_before(spec: TensorSpec, tensor: Tensor) -> Tensor:
    """The elements of all sources in order: where each went is seen by combining their numbers."""
    counts = [math.prod(source.shape) for source in spec.sources]
    numbers = torch.arange(sum(counts), device=tensor.device).split(counts)
    shaped = [n.view(source.shape) for n, source in zip(numbers, spec.sources, strict=True)]
    original = torch.empty_like(tensor).reshape(-1)
    original[spec.combine(shaped).reshape(-1)] = tensor.reshape(-1)
    return original


def language_model(config: ARConfig, weights: Weights) -> Any:
    """transformers' Qwen3ForCausalLM, with the floating-point weights that quantized ones stand for."""
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    settings = Qwen3Config(**language_config(config))
    with torch.device("meta"):
        model = Qwen3ForCausalLM(settings)
    model.model.rotary_emb = Qwen3RotaryEmbedding(settings)  # computed, not loaded; float32
    originals = original_tensors(ar_layout(config), dequantized(weights))
    head = originals.pop("lm_head.weight", originals["embed_tokens.weight"])
    state = {f"model.{name}": tensor for name, tensor in originals.items()}
    return _loaded(model, {**state, "lm_head.weight": head})


def transformer(config: DiTConfig, weights: Weights) -> Any:
    """diffusers' SanaTransformer2DModel, with the floating-point weights that quantized ones stand for."""
    from diffusers import SanaTransformer2DModel

    with torch.device("meta"):
        model = SanaTransformer2DModel.from_config(transformer_config(config))
    return _loaded(model, original_tensors(dit_layout(config), dequantized(weights)))


def autoencoder(config: VAEConfig, weights: Weights) -> Any:
    """diffusers' AutoencoderDC, with copies of the weights."""
    from diffusers import AutoencoderDC

    with torch.device("meta"):
        model = AutoencoderDC.from_config(vae_config(config))
    return _loaded(model, original_tensors(vae_layout(config), weights))


def scheduler(config: SchedulerConfig) -> Any:
    """diffusers' FlowMatchEulerDiscreteScheduler."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=config.num_train_timesteps, shift=config.shift)


def diffusion_connector(config: ModelConfig, weights: Weights) -> nn.Sequential:
    """The published connector as torch modules."""
    hidden, caption = config.ar.hidden_size, config.dit.caption_channels
    with torch.device("meta"):
        layers = nn.Sequential(
            nn.Linear(hidden, caption),
            nn.GELU(approximate="tanh"),
            nn.Linear(caption, caption),
            nn.RMSNorm(caption, eps=NORM_EPS),
        )
    prefix = "diffusion_connector."
    originals = original_tensors(connector_layout(config), weights)
    state = {n.removeprefix(prefix): t for n, t in originals.items() if n.startswith(prefix)}
    return _loaded(layers, state)


class VisionTower:
    """TA-Tok on transformers' SiglipVisionModel, cut off above the layer in use, with our codebook.

    The published code runs the whole tower and normalizes the codebook at every image; leaving that out
    favours the baseline.
    """

    def __init__(self, config: TATokConfig, weights: Weights) -> None:
        from transformers import SiglipVisionConfig, SiglipVisionModel

        cut_off = {"num_hidden_layers": config.layers_run, "vision_use_head": False}
        settings = SiglipVisionConfig(**{**vision_config(config), **cut_off})
        originals = original_tensors(ta_tok_layout(config), weights)
        state = {n.removeprefix("encoder."): t for n, t in originals.items() if n.startswith("encoder.")}
        with torch.device("meta"):
            model = SiglipVisionModel(settings)
        like = originals["encode_task_layer.0.weight"]  # computed by the module and used by nobody:
        unused = {n: like.new_zeros(t.shape) for n, t in model.state_dict().items() if "post_layernorm" in n}
        buffers = {"embeddings.position_ids": torch.arange(config.tokens)[None]}
        self.model = _loaded(model, {**unused, **state}, buffers)
        self.task = originals["encode_task_layer.0.weight"], originals["encode_task_layer.0.bias"]
        bottleneck = originals["bottleneck.in_linear.weight"], originals["bottleneck.in_linear.bias"]
        self.bottleneck = bottleneck[0].float(), bottleneck[1].float()
        self.codebook = weights["codebook"]
        self.dtype = self.task[0].dtype

    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Features [1, N, hidden] and codes [1, N] of pixels [1, C, S, S]."""
        states = self.model(pixel_values=pixels.to(self.dtype), output_hidden_states=True).hidden_states
        features = torch.tanh(nn.functional.linear(states[-1], *self.task))
        projected = nn.functional.linear(features.float(), *self.bottleneck)
        return features, (nn.functional.normalize(projected, dim=-1) @ self.codebook.T).argmax(dim=-1)


def _loaded(module: Any, state: Mapping[str, Tensor], buffers: Mapping[str, Tensor] | None = None) -> Any:
    """A module made without values, given those of the state in their widest dtype, on their device."""
    device = next(iter(state.values())).device
    dtype = max((tensor.dtype for tensor in state.values()), key=lambda dtype: dtype.itemsize)
    module.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, assign=True)
    for name, value in (buffers or {}).items():
        owner, _, attribute = name.rpartition(".")
        module.get_submodule(owner).register_buffer(attribute, value, persistent=False)
    return module.eval().requires_grad_(False).to(device)
