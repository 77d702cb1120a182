"""Rollouts the published way, to compare times with: transformers' generate, a second pass, diffusers."""

from __future__ import annotations

import torch
from torch import Tensor

from blip3o_rt.measure.shapes.codes import TOKENS_PER_IMAGE
from blip3o_rt.measure.shapes.tasks import Task
from examples.shapes.evaluate import pixels
from examples.shapes.model_config import LATENT_CHANNELS, LATENT_SIDE
from examples.shapes.reference_pipeline import ReferencePipeline

SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": 0}
SAMPLING |= {"min_new_tokens": TOKENS_PER_IMAGE, "max_new_tokens": TOKENS_PER_IMAGE}


class PublishedRollouts:
    """Samples of a prompt as one batch through the trainer's own modules.

    The whole vocabulary is sampled at temperature 1, without filters. What all samples share of a reference
    image, its tokens and latents, is computed once.
    """

    def __init__(self, reference: ReferencePipeline) -> None:
        self._reference = reference

    @torch.no_grad()
    def tokens(self, task: Task, samples: int) -> tuple[Tensor, Tensor]:
        """The tokens [samples, T] of a task, and their hidden states [samples, T + 1, H] by a second pass."""
        decoder, tokenizer = self._reference.model.language_model, self._reference.tokenizer
        if task.reference is None:
            ids = tokenizer.text_to_image(task.prompt)
        else:
            codes = self._reference.image_tokenizer.encode(pixels(task.reference)[None])[0].tolist()
            ids = tokenizer.edit(task.prompt, codes)
        prompts = torch.tensor([ids] * samples)
        drawn = decoder.generate(prompts, attention_mask=torch.ones_like(prompts), **SAMPLING)
        hidden = decoder.model(input_ids=drawn, use_cache=False).last_hidden_state
        return drawn[:, len(ids) :], hidden[:, len(ids) - 1 :]

    @torch.no_grad()
    def images(self, task: Task, hidden: Tensor, steps: int) -> Tensor:
        """The images uint8 [samples, 3, H, W] of hidden states."""
        latents = None
        if task.reference is not None:
            latents = self._reference.autoencoder.latents(pixels(task.reference)[None])
            latents = latents.expand(len(hidden), -1, -1, -1)
        noise = torch.randn(len(hidden), LATENT_CHANNELS, LATENT_SIDE, LATENT_SIDE)
        return (self._reference.render(hidden, noise, latents, steps) * 255).round().to(torch.uint8)
