"""Rollouts: images with the tokens they were drawn of and how likely these were, as a trainer needs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from blip3o_rt.errors import ImageError, shown
from blip3o_rt.images import ReferenceImage
from blip3o_rt.params import reference_list
from blip3o_rt.result import Report

BATCHES = 8  # of the token engine, whose plans are held at a time


@dataclass(frozen=True)
class Rollout:
    """One sample of a prompt. Every tensor is on the CPU.

    Attributes:
        prompt: What to draw, or what to change.
        seed: Of its tokens and its noise.
        prompt_ids: int64 [P], vocabulary ids of the prompt with its template and reference tokens.
        token_ids: int64 [T], vocabulary ids of the image tokens.
        logprobs: float32 [T], of each token over the whole vocabulary at temperature 1.
        processed_logprobs: float32 [T], of each token after temperature, top_k and top_p.
        image: uint8 [3, H, W], None where none was asked for.
        hidden_states: [T + 1, hidden] from `<S0>` to the last image token, None where not asked for.
        weights_version: Which weights drew it: how often they had been updated.
    """

    prompt: str
    seed: int
    prompt_ids: Tensor
    token_ids: Tensor
    logprobs: Tensor
    processed_logprobs: Tensor
    image: Tensor | None = None
    hidden_states: Tensor | None = None
    weights_version: int = 0


class Rollouts(list[Rollout]):
    """All samples of the first prompt, then those of the next; `report` says what they took."""

    def __init__(self, rollouts: Sequence[Rollout], report: Report) -> None:
        super().__init__(rollouts)
        self.report = report


def references_of(
    references: Sequence[ReferenceImage | Sequence[ReferenceImage] | None] | None, prompts: int
) -> list[list[ReferenceImage] | None]:
    """The reference images of every prompt, None for text-to-image. Raises ImageError."""
    if references is None:
        return [None] * prompts
    if not isinstance(references, list | tuple) or len(references) != prompts:
        raise ImageError(
            f"references is {shown(references)}: accepted is a list with an entry for each of the "
            f"{prompts} prompts, an image or None"
        )
    return [None if entry is None else reference_list(entry) for entry in references]
