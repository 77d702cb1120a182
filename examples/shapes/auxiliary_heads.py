"""Heads of the joint stage that are thrown away: they make condition and transformer say where and what.

The transformer has to match each latent cell with the condition tokens of the same place, and nothing in the
architecture tells a condition token its place: the decoder has it only to count by. Flow matching alone
teaches a small model shapes and colours long before it puts them where they belong.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from blip3o_rt.measure.shapes.codes import GRID, TOKENS_PER_IMAGE

from .embedded_model import EmbeddedModel
from .model_config import CAPTION_CHANNELS, CODEBOOK_SIZE, LATENT_SIDE, TRANSFORMER
from .training import autocast

PLACE_BLOCK = 1  # the transformer block after which a cell can know its place: two 3 x 3 convolutions
TOKENS_PER_CELL = (GRID // LATENT_SIDE) ** 2


class AuxiliaryHeads(nn.Module):
    """Reads a condition token's index, a latent cell's place, and the image tokens that a cell shows."""

    def __init__(self, model: EmbeddedModel) -> None:
        super().__init__()
        width = TRANSFORMER["num_attention_heads"] * TRANSFORMER["attention_head_dim"]
        self.index = nn.Linear(CAPTION_CHANNELS, TOKENS_PER_IMAGE + 1)
        self.place = nn.Linear(width, 2 * LATENT_SIDE**2)
        self.shown = nn.Linear(width, TOKENS_PER_CELL * CODEBOOK_SIZE)
        self.states: dict[str, torch.Tensor] = {}
        blocks = model.sana.transformer_blocks
        for name, block in (("place", blocks[PLACE_BLOCK]), ("shown", blocks[-1])):
            block.register_forward_hook(lambda _m, _i, output, name=name: self.states.update({name: output}))

    def loss(
        self, condition: torch.Tensor, codes: torch.Tensor, dropped: torch.Tensor, width: int
    ) -> dict[str, torch.Tensor]:
        """Cross-entropies by name, of the model's last velocity(), where cells were LATENT_SIDE x width.

        condition [N, tokens, C] before any is dropped, codes [M, TOKENS_PER_IMAGE] of every noisy latent and
        dropped [M], the latents whose condition was dropped.
        """
        with autocast():
            index = self.index(condition[:, : TOKENS_PER_IMAGE + 1]).float()
            place = self.place(self.states["place"]).float()
            shown = self.shown(self.states["shown"].unflatten(1, (LATENT_SIDE, width))[:, :, :LATENT_SIDE])
        indices = torch.arange(TOKENS_PER_IMAGE + 1).repeat(len(index))
        places = (
            torch.arange(2 * LATENT_SIDE**2).view(LATENT_SIDE, -1)[:, :width].flatten().repeat(len(place))
        )
        side = GRID // LATENT_SIDE
        cells = codes.view(-1, LATENT_SIDE, side, LATENT_SIDE, side).transpose(2, 3)[~dropped]
        return {
            "index": F.cross_entropy(index.flatten(0, 1), indices),
            "place": F.cross_entropy(place.flatten(0, 1), places),
            "shown": F.cross_entropy(shown[~dropped].float().reshape(-1, CODEBOOK_SIZE), cells.flatten()),
        }
