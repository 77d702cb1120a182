"""The finished autoencoder between images and latents of unit variance."""

from __future__ import annotations

import random
import time
from pathlib import Path

import torch

from blip3o_rt.measure.shapes.render import render_batch
from blip3o_rt.measure.shapes.scene import training_scene

from .train_autoencoder import build_autoencoder
from .training import finished_module, load_state

POLL_SECONDS = 20


def wait_for_encoder(run: Path) -> None:
    """Returns once the run folder's encoder is final: until then latents would still change their meaning."""
    while not (load_state(run / "autoencoder.pt") or {}).get("encoder_final", False):
        time.sleep(POLL_SECONDS)


class Latents:
    """A run folder's autoencoder; scaling_factor brings latents to unit variance.

    An imported autoencoder keeps the factor that it was exported with.
    """

    def __init__(self, run: Path) -> None:
        self.autoencoder = finished_module(build_autoencoder(), run / "autoencoder.pt")
        imported = (load_state(run / "autoencoder.pt") or {}).get("scaling_factor")
        self.scaling_factor = imported or self._measured_factor()

    def _measured_factor(self) -> float:
        rng = random.Random(3)
        scenes = [training_scene(rng) for _ in range(256)]
        self.scaling_factor = 1.0
        return round(1 / float(self.latents(render_batch(scenes)[0]).std()), 5)

    @torch.no_grad()
    def latents(self, images: torch.Tensor) -> torch.Tensor:
        """Scaled latents [N, C, h, w] of images in [0, 1]."""
        return self.autoencoder.encode(images * 2 - 1).latent * self.scaling_factor

    @torch.no_grad()
    def images(self, latents: torch.Tensor) -> torch.Tensor:
        """Images [N, 3, H, W] in [0, 1] of scaled latents."""
        return (self.autoencoder.decode(latents / self.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
