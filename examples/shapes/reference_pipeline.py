"""Generates images with the reference modules alone (transformers, diffusers), in batches."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import DynamicCache

from blip3o_rt.measure.shapes.codes import TOKENS_PER_IMAGE

from .embedded_model import EmbeddedModel
from .image_tokenizer import ImageTokenizer
from .latents import Latents
from .model_config import CODEBOOK_SIZE, LATENT_CHANNELS, LATENT_SIDE
from .tokenizer import PromptTokenizer
from .training import finished_module

STEPS = 30
GUIDANCE = 2.0
TOP_K = max(1, round(1200 / 65536 * CODEBOOK_SIZE))  # the published value scaled to the codebook
TOP_P = 0.95


def sample_tokens(logits: torch.Tensor, top_k: int, generator: torch.Generator) -> torch.Tensor:
    """One token per row [N]: temperature 1, then top-k, then top-p."""
    values, order = logits.float().topk(top_k, dim=-1)
    probabilities = values.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    kept = torch.where(before < TOP_P, probabilities, 0.0)
    return order.gather(1, torch.multinomial(kept, 1, generator=generator)).squeeze(1)


class ReferencePipeline:
    """The trained stages of a run folder, ready to draw."""

    def __init__(self, run: Path) -> None:
        self.tokenizer = PromptTokenizer(run / "tokenizer")
        self.autoencoder = Latents(run)
        self.image_tokenizer = finished_module(ImageTokenizer(), run / "image_tokenizer.pt")
        self.model = finished_module(EmbeddedModel(self.tokenizer.vocab_size), run / "joint.pt")

    @torch.no_grad()
    def plan(
        self, prompts: torch.Tensor, top_k: int, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes [N, tokens] and hidden states [N, tokens + 1, H] of prompts [N, L] of equal length."""
        cache, ids, hidden, tokens = DynamicCache(), prompts, [], []
        for _ in range(TOKENS_PER_IMAGE):
            states = self.model.language_model.model(input_ids=ids, past_key_values=cache).last_hidden_state[
                :, -1
            ]
            ids = sample_tokens(self.model.language_model.lm_head(states), top_k, generator)[:, None]
            hidden.append(states)
            tokens.append(ids)
        last = self.model.language_model.model(input_ids=ids, past_key_values=cache).last_hidden_state[:, -1]
        return torch.cat(tokens, dim=1) - self.tokenizer.first_image_id, torch.stack([*hidden, last], dim=1)

    @torch.no_grad()
    def render(
        self, hidden: torch.Tensor, noise: torch.Tensor, reference: torch.Tensor | None, steps: int = STEPS
    ) -> torch.Tensor:
        """Images [N, 3, H, W] by Euler steps with guidance, from noise [N, C, h, w]."""
        condition = torch.cat(
            [self.model.null_condition(hidden, reference), self.model.condition(hidden, reference)]
        )
        twice = None if reference is None else reference.repeat(2, 1, 1, 1)
        sigmas = [*torch.linspace(1, 1 / steps, steps).tolist(), 0.0]
        latents = noise
        for sigma, following in itertools.pairwise(sigmas):
            both = latents.repeat(2, 1, 1, 1)
            velocity = self.model.velocity(both, torch.full((len(both),), sigma), condition, twice)
            unconditional, conditional = velocity.chunk(2)
            guided = unconditional + GUIDANCE * (conditional - unconditional)
            latents = latents + (following - sigma) * guided
        return self.autoencoder.images(latents)

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[str], references: torch.Tensor | None, seed: int, top_k: int = TOP_K
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Images [N, 3, H, W] and codes [N, tokens] of captions, or of edits of references [N, 3, H, W]."""
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(len(prompts), LATENT_CHANNELS, LATENT_SIDE, LATENT_SIDE, generator=generator)
        if references is None:
            ids, latents = [self.tokenizer.text_to_image(prompt) for prompt in prompts], None
        else:
            codes = self.image_tokenizer.encode(references).tolist()
            ids = [self.tokenizer.edit(prompt, code) for prompt, code in zip(prompts, codes, strict=True)]
            latents = self.autoencoder.latents(references)
        groups: dict[int, list[int]] = defaultdict(list)
        for row, prompt in enumerate(ids):
            groups[len(prompt)].append(row)
        planned, hidden = [torch.empty(0)] * len(ids), [torch.empty(0)] * len(ids)
        for rows in groups.values():
            tokens, states = self.plan(torch.tensor([ids[row] for row in rows]), top_k, generator)
            for row, row_tokens, row_states in zip(rows, tokens, states, strict=True):
                planned[row], hidden[row] = row_tokens, row_states
        return self.render(torch.stack(hidden), noise, latents), torch.stack(planned)
