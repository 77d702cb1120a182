"""What a request gives: a plan of the first stage, and pictures that say how they were made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from torch import Tensor

from blip3o_rt.errors import GenerationError
from blip3o_rt.metadata import save_png
from blip3o_rt.params import SamplingParams
from blip3o_rt.report import Report


@dataclass(frozen=True)
class Plan:
    """The autoregressive stage's result for one picture.

    prompt_ids [1, P] and token_ids [1, T] are vocabulary ids (int64); hidden_states [1, T + 1, hidden] are
    the decoder's final states from `<S0>` to the last image token. reference_latents are the scaled VAE
    latents [1, C, h, w] of an edit's images, reference_sha256 the hashes of their pixels.
    non_image_positions lists the tokens that are not image tokens, which only whole-vocabulary sampling and
    replayed tokens can contain. replayed: the tokens were given, not drawn. switches are those of the fast
    tier that it was made with, whoever renders it. error says why a plan cannot be rendered.
    """

    prompt: str
    prompt_ids: Tensor
    token_ids: Tensor
    hidden_states: Tensor
    sampling: SamplingParams
    reference_latents: tuple[Tensor, ...] = ()
    reference_sha256: tuple[str, ...] = ()
    non_image_positions: tuple[int, ...] = ()
    replayed: bool = False
    switches: Mapping[str, str] = field(default_factory=dict)
    error: GenerationError | None = None


class Result(list[Image.Image]):
    """Pictures in order, with the `plans` they came from and a `report` of time, implementations and
    memory."""

    def __init__(self, images: Sequence[Image.Image], plans: Sequence[Plan], report: Report) -> None:
        super().__init__(images)
        self.plans = list(plans)
        self.report = report

    def save(self, directory: str | Path) -> list[Path]:
        """Write the pictures as 000.png, 001.png, ... with their metadata; makes the directory if missing."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{index:03d}.png" for index in range(len(self))]
        for image, path in zip(self, paths, strict=True):
            save_png(image, path, image.info)
        return paths
