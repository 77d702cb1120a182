"""What the joint stage trains: Qwen3 decoder, connectors and SANA transformer (reference modules)."""

from __future__ import annotations

import torch
from diffusers import SanaTransformer2DModel
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from .model_config import CAPTION_CHANNELS, LANGUAGE_MODEL, LATENT_CHANNELS, TRANSFORMER

FIRST_GATE = 0.5  # of every residual branch: an untrained table would start them nearly closed


def connector(inputs: int) -> nn.Sequential:
    """Linear, GELU (tanh), Linear, RMSNorm into the transformer's condition width."""
    return nn.Sequential(
        nn.Linear(inputs, CAPTION_CHANNELS),
        nn.GELU(approximate="tanh"),
        nn.Linear(CAPTION_CHANNELS, CAPTION_CHANNELS),
        nn.RMSNorm(CAPTION_CHANNELS, eps=1e-5),
    )


class EmbeddedModel(nn.Module):
    """Everything that the joint stage trains."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.language_model = Qwen3ForCausalLM(Qwen3Config(vocab_size=vocab_size, **LANGUAGE_MODEL))
        self.diffusion_connector = connector(LANGUAGE_MODEL["hidden_size"])
        self.und_image_vae_connector = connector(LATENT_CHANNELS)
        self.sana = SanaTransformer2DModel(**TRANSFORMER)
        with torch.no_grad():
            for block in self.sana.transformer_blocks:
                block.scale_shift_table[[2, 5]] = FIRST_GATE

    def condition(self, hidden: torch.Tensor, reference: torch.Tensor | None) -> torch.Tensor:
        """Cross-attention tokens [N, tokens, CAPTION_CHANNELS]; an edit's reference latents add theirs."""
        tokens = self.diffusion_connector(hidden)
        if reference is None:
            return tokens
        return torch.cat([tokens, self.und_image_vae_connector(reference.flatten(2).transpose(1, 2))], dim=1)

    def null_condition(self, hidden: torch.Tensor, reference: torch.Tensor | None) -> torch.Tensor:
        """The unconditional tokens: the connector of zeros, and for an edit zeros after the connector."""
        tokens = self.diffusion_connector(torch.zeros_like(hidden))
        if reference is None:
            return tokens
        cells = reference.shape[2] * reference.shape[3]
        return torch.cat([tokens, tokens.new_zeros(len(tokens), cells, tokens.shape[-1])], dim=1)

    def velocity(
        self,
        latents: torch.Tensor,
        sigma: torch.Tensor,
        condition: torch.Tensor,
        reference: torch.Tensor | None,
    ) -> torch.Tensor:
        """Predicted noise - data [N, C, h, w]; an edit's reference stands right of the noisy latents."""
        width = latents.shape[-1]
        if reference is not None:
            latents = torch.cat([latents, reference], dim=-1)
        output = self.sana(
            latents, encoder_hidden_states=condition, timestep=1000 * sigma, return_dict=False
        )[0]
        return output[..., :width]
