"""The denoising of one image from its noise to its latent, eagerly or over captured buffers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from blip3o_rt.dit.captured import CapturedImages
from blip3o_rt.dit.conditioning import Condition
from blip3o_rt.dit.denoise import Denoising
from blip3o_rt.dit.model import DiT, ScheduleTables
from blip3o_rt.dit.step import EagerSteps, StepKind, StepState


def denoise(
    dit: DiT,
    noise: Tensor,
    tables: ScheduleTables,
    condition: Condition,
    guidance_scale: float,
    *,
    reference_latent: Tensor | None = None,
    kinds: Sequence[StepKind] | None = None,
    captured: CapturedImages | None = None,
) -> Tensor:
    """The latent after all steps. `captured`: buffers whose first image `condition` is that of."""
    if captured is None:
        state = StepState.begin(dit, noise, tables, condition, guidance_scale, reference_latent)
        return Denoising(EagerSteps(dit), state, tables, kinds).run()
    image = captured.images[0]
    image.begin(noise, tables, guidance_scale, reference_latent)
    return Denoising(captured, image.state, tables, kinds).run()
