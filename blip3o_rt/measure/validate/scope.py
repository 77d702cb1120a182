"""How much of a model a validation runs: all of a small one, a little of every stage of a large one."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from blip3o_rt.checkpoint.parts import weight_bytes
from blip3o_rt.config import ModelConfig

LARGE_BYTES = 2**30  # of weights in bfloat16, from which a stage takes seconds rather than milliseconds
LARGE_TOKENS, LARGE_LATENT, LARGE_STEPS = 8, 8, 2
SMALL_STEPS = 4


@dataclass(frozen=True)
class Scope:
    """Image tokens drawn, side of the latent, denoising steps.

    large: the model is loaded stage by stage, and the pipeline is run once, as large as it is, in bfloat16.
    """

    tokens: int
    latent: int
    steps: int
    large: bool = False

    @classmethod
    def of(cls, config: ModelConfig, *, tokens: int | None, latent: int | None, steps: int | None) -> Scope:
        """The scope for a model; None takes what fits its size."""
        large = sum(weight_bytes(config, torch.bfloat16).values()) > LARGE_BYTES
        whole = config.image_tokens.tokens_per_image, config.dit.sample_size
        most_tokens, most_latent = (LARGE_TOKENS, LARGE_LATENT) if large else whole
        return cls(
            tokens=tokens or min(most_tokens, whole[0]),
            latent=latent or min(most_latent, whole[1]),
            steps=steps or (LARGE_STEPS if large else SMALL_STEPS),
            large=large,
        )

    def shorten(self, config: ModelConfig) -> ModelConfig:
        """The model's geometry with the scope's tokens and latent."""
        return replace(
            config,
            image_tokens=replace(config.image_tokens, tokens_per_image=self.tokens),
            dit=replace(config.dit, sample_size=self.latent),
        )

    def note(self, config: ModelConfig) -> str:
        """What is run, in words."""
        whole = config.image_tokens.tokens_per_image, config.dit.sample_size
        side = self.latent * config.vae.compression
        return (
            f"stages: {self.tokens} of {whole[0]} tokens, latents of {self.latent} x {self.latent} of "
            f"{whole[1]} x {whole[1]} ({side} x {side} pixels), {self.steps} steps"
        )
