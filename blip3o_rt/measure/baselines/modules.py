"""The published model's modules of transformers and diffusers, from its configurations and tensors.

With a state dict a module holds those tensors as they are, frozen, on their device. Without one it has the
weights that its library initializes it with, ready to be trained. diffusers is imported when it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM, SiglipVisionConfig, SiglipVisionModel
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

CONNECTOR_EPS = 1e-5
QWEN3_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "attention_bias", "rope_theta"),
    *("hidden_act", "rms_norm_eps", "tie_word_embeddings", "initializer_range"),
)

State = Mapping[str, Tensor]


def language_model(config: Mapping[str, Any], state: State | None = None) -> Any:
    """Qwen3ForCausalLM of a config.json, which may have more keys. A tied head need not be in the state."""
    settings = Qwen3Config(**{key: config[key] for key in QWEN3_KEYS if key in config})
    if state is None:
        return Qwen3ForCausalLM(settings)
    tied = {"lm_head.weight": state["model.embed_tokens.weight"]} if settings.tie_word_embeddings else {}
    # Computed, not loaded; float32 in a bfloat16 model too, as from_pretrained leaves it.
    rotation = Qwen3RotaryEmbedding(settings)
    return _filled(lambda: Qwen3ForCausalLM(settings), {**state, **tied}, {"model.rotary_emb": rotation})


def transformer(config: Mapping[str, Any], state: State | None = None) -> Any:
    """SanaTransformer2DModel of a transformer/config.json."""
    from diffusers import SanaTransformer2DModel

    return _filled(lambda: SanaTransformer2DModel.from_config(config), state)


def autoencoder(config: Mapping[str, Any], state: State | None = None) -> Any:
    """AutoencoderDC of a vae/config.json."""
    from diffusers import AutoencoderDC

    return _filled(lambda: AutoencoderDC.from_config(config), state)


def vision_tower(config: Mapping[str, Any], state: State | None = None, layers: int | None = None) -> Any:
    """SiglipVisionModel of a vision tower's configuration.

    layers: how many of its layers are looked at (all). The state may leave out what stands above them, which
    is filled with zeros then.
    """
    settings = SiglipVisionConfig(**config)
    if state is None:
        return SiglipVisionModel(settings)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in SiglipVisionModel(settings).state_dict().items()}
    count = settings.num_hidden_layers
    first = count if layers is None else layers
    above = (
        *(f"encoder.layers.{layer}." for layer in range(first, count)),
        "post_layernorm.",
        "head.",
    )
    like = next(iter(state.values()))
    unused = {name: like.new_zeros(shape) for name, shape in shapes.items() if name.startswith(above)}
    positions = torch.arange((settings.image_size // settings.patch_size) ** 2)[None]
    return _filled(
        lambda: SiglipVisionModel(settings), {**unused, **state}, {"embeddings.position_ids": positions}
    )


def connector(inputs: int, width: int, state: State | None = None) -> Any:
    """Linear, GELU (tanh), Linear, RMSNorm: from states of `inputs` numbers to conditions of `width`."""
    from diffusers.models.normalization import RMSNorm

    def layers() -> nn.Sequential:
        return nn.Sequential(
            nn.Linear(inputs, width),
            nn.GELU(approximate="tanh"),
            nn.Linear(width, width),
            RMSNorm(width, eps=CONNECTOR_EPS, elementwise_affine=True),
        )

    return _filled(layers, state)


def scheduler(config: Mapping[str, Any], steps: int, device: torch.device | None = None) -> Any:
    """FlowMatchEulerDiscreteScheduler, set to the published sigmas of a number of steps."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    found = FlowMatchEulerDiscreteScheduler.from_config(config)
    found.set_timesteps(steps, sigmas=np.linspace(1.0, 1.0 / steps, steps), device=device)
    return found


def _filled(
    build: Callable[[], Any], state: State | None, computed: Mapping[str, Tensor | nn.Module] | None = None
) -> Any:
    """What `build` makes; with a state without values of its own first, and frozen.

    computed: modules and buffers by name that no state has. Raises ValueError for tensors without values.
    """
    if state is None:
        return build()
    with torch.device("meta"):
        module = build()
    for name, value in (computed or {}).items():
        owner, _, attribute = name.rpartition(".")
        if isinstance(value, nn.Module):
            setattr(module.get_submodule(owner), attribute, value)
        else:
            module.get_submodule(owner).register_buffer(attribute, value, persistent=False)
    module.load_state_dict(dict(state), assign=True)
    if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        raise ValueError(f"{type(module).__name__} has tensors that no checkpoint gives")
    return module.eval().requires_grad_(False).to(next(iter(state.values())).device)
