"""The oracle of the image tokenizer: transformers' SigLIP tower, and a cosine quantizer in float64."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from blip3o_rt.config import TATokConfig
from blip3o_rt.tatok.layout import layout


def small_config(**changes: object) -> TATokConfig:
    """An image tokenizer small enough for a test; patches do not fill the image, as 14 do not fill 384."""
    fields: dict[str, object] = {
        "image_size": 30,
        "patch_size": 7,
        "image_channels": 3,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_layers": 3,
        "num_heads": 2,
        "layer_norm_eps": 1e-6,
        "selected_layer": -2,
        "bottleneck_dim": 12,
        "codebook_size": 50,
    }
    return TATokConfig(**{**fields, **changes})  # type: ignore[arg-type]


class Oracle(nn.Module):
    """SiglipVisionModel, Linear and Tanh, and the parts of the quantizer, under the names of a ta_tok.pth."""

    def __init__(self, config: TATokConfig) -> None:
        super().__init__()
        self.selected_layer = config.selected_layer
        tower = SiglipVisionModel(
            SiglipVisionConfig(
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                num_channels=config.image_channels,
                image_size=config.image_size,
                patch_size=config.patch_size,
                layer_norm_eps=config.layer_norm_eps,
                hidden_act="gelu_pytorch_tanh",
                vision_use_head=False,
            )
        )
        self.encoder = getattr(tower, "vision_model", tower)
        self.encode_task_layer = nn.Sequential(nn.Linear(config.hidden_size, config.hidden_size), nn.Tanh())
        self.bottleneck = nn.Module()
        self.bottleneck.in_linear = nn.Linear(config.hidden_size, config.bottleneck_dim)
        self.bottleneck.regularizer = nn.Module()
        self.bottleneck.regularizer.embedding = nn.Embedding(config.codebook_size, config.bottleneck_dim)
        self.bottleneck.regularizer.embedding_proj = nn.Linear(config.bottleneck_dim, config.bottleneck_dim)

    @torch.inference_mode()
    def features(self, pixels: Tensor) -> Tensor:
        """[B, N, hidden] after Linear and Tanh."""
        states = self.encoder(pixels, output_hidden_states=True).hidden_states
        return self.encode_task_layer(states[self.selected_layer])

    @torch.inference_mode()
    def similarities(self, features: Tensor) -> Tensor:
        """[B, N, codes] cosines of the projected features with every code, in float64."""
        projection, quantizer = self.bottleneck.in_linear, self.bottleneck.regularizer
        projected = features.double() @ projection.weight.double().T + projection.bias.double()
        codes = quantizer.embedding.weight.double() @ quantizer.embedding_proj.weight.double().T
        codes = codes + quantizer.embedding_proj.bias.double()
        cosines = projected @ codes.T
        return cosines / projected.norm(dim=-1)[..., None] / codes.norm(dim=-1)


def oracle(config: TATokConfig, seed: int = 0) -> Oracle:
    """Seeded random weights wide enough that attention is far from uniform, float32, in evaluation mode."""
    torch.manual_seed(seed)
    model = Oracle(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            spread = 0.5 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.1
            if "self_attn" in name or "embedding" in name:
                spread *= 3
            parameter.copy_(offset + spread * torch.randn_like(parameter))
    return model.eval()


def round_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Round the weights as a checkpoint of that dtype would hold them, and keep them in float32."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))


def runtime_weights(config: TATokConfig, model: Oracle, dtype: torch.dtype) -> dict[str, Tensor]:
    """The oracle's weights in the runtime's layout."""
    original = model.state_dict()
    return {
        spec.name: spec.build([original[source.name] for source in spec.sources], dtype)
        for spec in layout(config)
    }
