"""TA-Tok in small: SigLIP vision tower, bottleneck, cosine codebook (SimVQ); reference modules."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from blip3o_rt.measure.shapes.codes import USED_CODES, code_meaning
from blip3o_rt.measure.shapes.scene import BACKGROUNDS, COLOURS, KINDS, SIZES

from .model_config import CODE_WIDTH, CODEBOOK_SIZE, VISION_SELECT_LAYER, VISION_TOWER


def code_properties() -> list[list[float]]:
    """One row per code marking its background or its colour, kind and size: the codebook's base."""
    marks = [
        *(("background", b) for b in BACKGROUNDS),
        *((c,) for c in COLOURS),
        *((k,) for k in KINDS),
        *((s,) for s in SIZES),
    ]
    rows = []
    for code in range(USED_CODES):
        meaning = code_meaning(code)
        has = {("background", *meaning)} if len(meaning) == 1 else {(word,) for word in meaning}
        rows.append([float(mark in has) for mark in marks])
    return rows


class Codebook(nn.Module):
    """Fixed rows under a learned projection; codes are compared by cosine.

    A row marks the properties its code stands for, so that what is learned of a kind or a colour serves every
    code that has it; spare codes are random.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CODEBOOK_SIZE, CODE_WIDTH)
        self.embedding.weight.requires_grad_(False)
        properties = torch.tensor(code_properties())
        self.embedding.weight[: len(properties)] = F.pad(properties, (0, CODE_WIDTH - properties.shape[1]))
        self.embedding_proj = nn.Linear(CODE_WIDTH, CODE_WIDTH)
        nn.init.eye_(self.embedding_proj.weight)
        nn.init.zeros_(self.embedding_proj.bias)

    def unit_rows(self) -> torch.Tensor:
        """L2-normalised projected rows, [codes, width]."""
        return F.normalize(self.embedding_proj(self.embedding.weight).float(), dim=-1)


class ImageTokenizer(nn.Module):
    """Images to codes. Module names are those of the published tokenizer's state dictionary."""

    def __init__(self) -> None:
        super().__init__()
        width = VISION_TOWER["hidden_size"]
        self.encoder = SiglipVisionModel(SiglipVisionConfig(**VISION_TOWER))
        self.encode_task_layer = nn.Sequential(nn.Linear(width, width), nn.Tanh())
        self.bottleneck = nn.ModuleDict(
            {"in_linear": nn.Linear(width, CODE_WIDTH), "regularizer": Codebook()}
        )

    def similarity_and_states(self, images: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Cosine of every token with every code [N, tokens, codes], and the tower's hidden states.

        Images are [N, 3, H, W] in [0, 1].
        """
        states = self.encoder(pixel_values=(images - 0.5) / 0.5, output_hidden_states=True).hidden_states
        features = self.bottleneck["in_linear"](self.encode_task_layer(states[VISION_SELECT_LAYER]))
        unit = F.normalize(features.float(), dim=-1)
        return unit @ self.bottleneck["regularizer"].unit_rows().T, states

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Codes int64 [N, tokens] of images [N, 3, H, W] in [0, 1]."""
        return self.similarity_and_states(images)[0].argmax(dim=-1)
