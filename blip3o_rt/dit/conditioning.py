"""What the DiT is conditioned on: the tokens of both branches of guidance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Projection = Callable[[Tensor], Tensor]  # [..., features] -> [..., caption_channels]


@dataclass(frozen=True)
class ConditionTokens:
    """Inputs of the cross-attention before the DiT's own projection.

    conditional [M, caption_channels]. null [U, caption_channels]: the distinct tokens of the unconditional
    branch; token u stands for null_counts[u] identical ones (attention does not mind their order).
    """

    conditional: Tensor
    null: Tensor
    null_counts: tuple[int, ...]


def condition_tokens(
    hidden_states: Tensor,
    diffusion_connector: Projection,
    reference_latents: Tensor | None = None,
    reference_connector: Projection | None = None,
) -> ConditionTokens:
    """The condition of one image.

    hidden_states [T, hidden] of the decoder; the unconditional branch sees zeros instead, *before* the
    connector. reference_latents [n, C, h, w] (scaled) of an edit that looks at its reference through
    cross-attention: each latent cell is a further token; the unconditional branch sees zeros instead, *after*
    the connector.
    """
    conditional = diffusion_connector(hidden_states)
    null = diffusion_connector(torch.zeros_like(hidden_states[:1]))
    counts: tuple[int, ...] = (len(hidden_states),)
    if reference_latents is not None and reference_connector is not None:
        reference = reference_connector(reference_latents.permute(0, 2, 3, 1).flatten(0, 2))
        conditional = torch.cat([conditional, reference])
        null = torch.cat([null, torch.zeros_like(null)])
        counts = (*counts, len(reference))
    return ConditionTokens(conditional, null, counts)


@dataclass(frozen=True)
class ConstantNull:
    """Cross-attention output of the unconditional branch when all its tokens are equal, [layers, D].

    It does not depend on the query, and is projected already.
    """

    outputs: Tensor


@dataclass(frozen=True)
class WeightedNull:
    """Keys and values [layers, H, U, d] of U distinct null tokens, and the logarithms of their counts."""

    keys: Tensor
    values: Tensor
    log_multiplicity: Tensor


@dataclass(frozen=True)
class Condition:
    """All that cross-attention needs of one image, for every layer and step.

    keys and values [layers, H, M, d] of the conditional branch (keys normed), and the unconditional branch:
    None for predictions without guidance.
    """

    keys: Tensor
    values: Tensor
    null: ConstantNull | WeightedNull | None

    @property
    def unguided(self) -> Condition:
        """The conditional branch alone."""
        return replace(self, null=None)
