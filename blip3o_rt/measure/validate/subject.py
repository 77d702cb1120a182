"""The model that is validated: ours and the published one on the same checkpoint, one of them at a time."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from blip3o_rt.checkpoint.load import Checkpoint, open_checkpoint
from blip3o_rt.checkpoint.manifest import MANIFEST, Manifest
from blip3o_rt.checkpoint.parts import DTYPES
from blip3o_rt.checkpoint.source import Source
from blip3o_rt.config import ModelConfig
from blip3o_rt.errors import CheckpointError
from blip3o_rt.measure.baselines.published import PublishedModel, Reference
from blip3o_rt.measure.validate.scope import Scope
from blip3o_rt.ops.random import normal_noise

PROMPT = "a red circle on a blue background"
INSTRUCTION = "make the circle green"
SEED = 7


class Subject:
    """A checkpoint in the published layout, what of it is run, and the inputs its stages are given.

    Nothing stays loaded: a checkpoint or a published model is dropped before the next is asked for.
    diffusion and ta_tok are as in `Source`. Raises CheckpointError for a folder in the runtime's own
    layout, which the published code cannot read.
    """

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        *,
        tokens: int | None = None,
        latent: int | None = None,
        steps: int | None = None,
        diffusion: Path | None = None,
        ta_tok: Path | None = None,
    ) -> None:
        if (folder / MANIFEST).is_file():
            source = Manifest.read(folder).source
            raise CheckpointError(
                f"{folder} is converted, and the published code cannot read it: give its source ({source})"
            )
        self.folder, self.device = folder, device
        self._diffusion, self._ta_tok = diffusion, ta_tok
        self._opened = open_checkpoint(Source(folder, diffusion, ta_tok))
        self.whole_config: ModelConfig = self._opened.config
        self.scope = Scope.of(self.whole_config, tokens=tokens, latent=latent, steps=steps)
        self.config = self.scope.shorten(self.whole_config)

    def ours(self, dtype: str, *parts: str, whole: bool = False) -> Checkpoint:
        """The named parts (none: all) in "fp32" or "bf16", with the geometry of the scope or the whole."""
        loaded = self._opened.load(self.device, DTYPES[dtype], parts=parts or None)
        return replace(loaded, config=self.whole_config if whole else self.config)

    def published(self, dtype: str, *, whole: bool = False) -> PublishedModel:
        """The published model in "fp32" or "bf16"; it loads its parts when they are used."""
        model = PublishedModel(
            self.folder, DTYPES[dtype], self.device, diffusion=self._diffusion, ta_tok=self._ta_tok
        )
        if not whole:
            model.latent_size = self.scope.latent
        return model

    @property
    def edits(self) -> bool:
        """Whether the DiT is shown a reference image's latent, as condition or beside the noise."""
        return self.config.edit.use_und_image_vae or self.lays_beside

    @property
    def lays_beside(self) -> bool:
        """Whether an edit lays the reference image's latent beside the noise."""
        return self.config.edit.use_und_image_vae_as_noise or self._channelwise

    def looks(self, references: list[Reference]) -> bool:
        """Whether the references' latents are part of the condition."""
        return bool(references) and self.config.edit.use_und_image_vae

    @property
    def draws_from_text(self) -> bool:
        """Whether the DiT runs without a reference image."""
        return not self._channelwise

    @property
    def _channelwise(self) -> bool:
        return self.config.dit.in_channels == 2 * self.config.vae.latent_channels

    @cached_property
    def image(self) -> Image.Image:
        """An image to edit, not square: shapes with straight, slanted and round edges over a gradient."""
        side = self.config.image_size
        width, height = side + side // 4, side
        ramp = Image.linear_gradient("L").resize((width, height))
        image = Image.merge("RGB", (ramp, ramp.rotate(180), Image.new("L", (width, height), 160)))
        draw = ImageDraw.Draw(image)
        draw.ellipse((width * 0.2, height * 0.25, width * 0.5, height * 0.7), fill=(220, 40, 30))
        draw.rectangle((width * 0.6, height * 0.1, width * 0.85, height * 0.4), fill=(250, 220, 40))
        draw.polygon(
            [(width * 0.65, height * 0.9), (width * 0.9, height * 0.9), (width * 0.75, height * 0.55)],
            fill=(30, 160, 70),
        )
        return image

    @cached_property
    def tokens(self) -> Tensor:
        """Image tokens [1, T] (vocabulary ids), each as likely as the others."""
        image_tokens = self.config.image_tokens.image_token_range
        generator = torch.Generator().manual_seed(SEED)
        return torch.randint(
            image_tokens.start, image_tokens.stop, (1, self.scope.tokens), generator=generator
        )

    @cached_property
    def noise(self) -> Tensor:
        side = self.scope.latent
        return normal_noise(SEED, (1, self.config.vae.latent_channels, side, side))

    @cached_property
    def prompt_ids(self) -> Tensor:
        """Ids [1, P] of PROMPT by the published wording."""
        return self.published("fp32").prompt_ids(PROMPT)

    @cached_property
    def hidden(self) -> Tensor:
        """Hidden states [1, T + 1, hidden] of `tokens` after PROMPT, by the published model in float32."""
        model = self.published("fp32")
        return model.hidden_states(model.prompt(PROMPT), self.tokens).clone()

    @cached_property
    def reference_latent(self) -> Tensor:
        """The latent [1, C, h, w] of `image`, by the published model in float32."""
        model = self.published("fp32")
        return model.encode(model.vae_pixels(self.image)).clone()

    def references(self) -> list[Reference]:
        """The reference image as the DiT of an edit sees it."""
        nothing = torch.empty(0)
        return [Reference(nothing, nothing, nothing, self.reference_latent)]
