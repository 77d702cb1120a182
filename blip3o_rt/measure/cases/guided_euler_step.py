"""Grids, guidance off, on and strong, and latents and predictions that are parts of larger tensors."""

from collections.abc import Iterator

import torch

from blip3o_rt.measure.validate.case import Case, random


def cases() -> Iterator[Case]:
    delta_sigma = torch.tensor(-1 / 30)
    for shape in ((1, 1, 1), (4, 5, 7), (32, 32, 32)):
        for guidance_scale in (0.0, 1.0, 2.0, 9.5):
            latent, prediction = random(1, 1, *shape), random(2, 2, *shape)
            label = f"{shape}, guidance {guidance_scale}"
            yield Case(label, (latent, prediction, torch.tensor(guidance_scale), delta_sigma))
    latent, prediction = random(3, 1, 4, 5, 14)[..., :7], random(4, 2, 8, 5, 14)[:, :4, :, :7]
    scalars = torch.tensor(2.0), delta_sigma
    yield Case("parts of larger tensors", (latent, prediction, *scalars))
    out = random(5, 1, 4, 5, 7)
    yield Case("given out", (latent, prediction, *scalars), {"out": out}, written=("out",))
