"""The second stage of a picture: from hidden states and reference latents to a latent, and to pixels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from blip3o_rt.checkpoint.load import Checkpoint
from blip3o_rt.config import ModelConfig
from blip3o_rt.connector.model import Connector
from blip3o_rt.dit.conditioning import ConditionTokens, condition_tokens
from blip3o_rt.dit.denoise import Denoising
from blip3o_rt.dit.model import DiT, ScheduleTables
from blip3o_rt.dit.recorded import Geometry, RecordedPicture
from blip3o_rt.dit.scheduler import flow_schedule
from blip3o_rt.dit.shortcuts import Shortcuts
from blip3o_rt.dit.step import StepKind, Steps, StepState
from blip3o_rt.graphs import Recorder
from blip3o_rt.params import DiffusionParams
from blip3o_rt.switches import VAE_TILES, setting
from blip3o_rt.vae.model import Autoencoder


def sees_reference(config: ModelConfig) -> bool:
    """Whether the transformer sees an edit's reference latent beside the noisy one."""
    return config.edit.use_und_image_vae_as_noise or config.dit.in_channels == 2 * config.vae.latent_channels


def latent_shape(config: ModelConfig) -> tuple[int, int, int, int]:
    """[1, C, h, w] of a picture's noise and latent."""
    side = config.dit.sample_size
    return (1, config.vae.latent_channels, side, side)


def recorded_geometries(config: ModelConfig, *, edits: bool) -> list[Geometry]:
    """Of the pictures that are recorded, the largest first: an edit of one reference, and from words."""
    noise = latent_shape(config)
    words = Geometry(noise, (config.image_tokens.tokens_per_image + 1, config.ar.hidden_size))
    side = config.image_size // config.vae.compression
    reference = (1, noise[1], side, side)
    edit = dataclasses.replace(
        words,
        beside=reference if sees_reference(config) else None,
        seen=reference if config.edit.use_und_image_vae else None,
    )
    draws_from_words = config.dit.in_channels == noise[1]
    return [*([edit] if edits and edit != words else []), *([words] if draws_from_words else [])]


class Renderer:
    """Connectors, diffusion transformer and autoencoder of a checkpoint, for one picture at a time.

    `recorder` records what `prepare` prepares. sees_reference says whether the transformer sees the reference
    latent beside the noisy one, as columns or as further channels; takes_references, whether an edit takes
    the latents of its reference pictures in any way.
    """

    def __init__(self, checkpoint: Checkpoint, recorder: Recorder) -> None:
        config, weights, switches = checkpoint.config, checkpoint.weights, checkpoint.switches
        edit = config.edit
        self.config = config
        self.device = checkpoint.device
        self.sees_reference = sees_reference(config)
        self.takes_references = edit.use_und_image_vae or self.sees_reference
        self._hidden_dtype = checkpoint.dtype
        self._recorder = recorder
        self._diffusion_connector = Connector(weights["connector"], "diffusion_connector")
        self._reference_connector = (
            Connector(weights["connector"], "und_image_vae_connector") if edit.use_und_image_vae else None
        )
        self._dit = DiT(config.dit, weights["dit"])
        self._vae = Autoencoder(config.vae, weights["vae"], recorder, setting(switches, VAE_TILES) or 1)
        self._shortcuts = Shortcuts.of(switches)
        self._schedules: dict[int, tuple[ScheduleTables, list[StepKind]]] = {}
        self._recorded: dict[Geometry, RecordedPicture] = {}

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """[1, C, h, w] of a picture's noise and latent."""
        return latent_shape(self.config)

    def prepare(self, *, edits: bool) -> None:
        """Record a picture from words and, with `edits`, an edit of one reference picture.

        Without graphs each is run once, which compiles its kernels. Other geometries run without a graph.
        """
        self._vae.prepare_decode(*self.latent_shape[2:])  # the largest first: all share its memory
        if edits and self.takes_references:
            self._vae.prepare_encode(self.config.image_size, self.config.image_size)
        for geometry in recorded_geometries(self.config, edits=edits):
            recorded = RecordedPicture(
                self._dit,
                geometry,
                self._tokens,
                self._hidden_dtype,
                self._recorder,
                self._shortcuts.kinds,
            )
            if self._recorder.captures:
                self._recorded[geometry] = recorded
            else:
                recorded.run_once()

    def encode(self, pixels: Tensor) -> Tensor:
        """The latent [1, C, h, w] of a reference picture's pixels [1, 3, H, W] in -1..1."""
        return self._vae.encode(pixels)

    def denoise(
        self,
        hidden_states: Tensor,
        references: tuple[Tensor, ...],
        noise: Tensor,
        params: DiffusionParams,
        callback: Callable[[int, int], None],
    ) -> Tensor:
        """The latent of hidden states [T, hidden] and the latents of an edit's reference pictures.

        The callback is told of every step; what it raises ends the loop.
        """
        with self.denoising(hidden_states, references, noise, params) as denoising:
            while denoising.done < denoising.total:
                denoising.step()
                callback(denoising.done, denoising.total)
            return denoising.latent

    @contextmanager
    def denoising(
        self,
        hidden_states: Tensor,
        references: tuple[Tensor, ...],
        noise: Tensor,
        params: DiffusionParams,
    ) -> Iterator[Denoising]:
        """The denoising of one image, before its first step; the buffers are its own within the block.

        Args:
            hidden_states: [T, hidden].
            references: The latents [1, C, h, w] of an edit's reference images.
            noise: [1, C, h, w].
            params: The number of steps and the guidance scale.
        """
        beside = references[0] if references and self.sees_reference else None
        seen = torch.cat(references) if references and self._reference_connector is not None else None
        hidden_states = hidden_states.to(self.device)
        tables, kinds = self._schedule(params.steps)
        recorded = self._recorded_picture(Geometry.of(noise, hidden_states, beside, seen))
        with nullcontext() if recorded is None else recorded.in_use():
            if recorded is None:
                condition = self._dit.condition(self._tokens(hidden_states, seen))
                state = StepState.begin(self._dit, noise, tables, condition, params.guidance, beside)
                steps = Steps(self._dit, state)
            else:
                recorded.condition(hidden_states, seen)
                steps = recorded.begin(noise, tables, params.guidance, beside)
            yield Denoising(steps, tables, kinds)

    def decode(self, latent: Tensor) -> Tensor:
        """The pixels [1, 3, H, W] in 0..1 of a latent."""
        return self._vae.decode(latent)

    def _recorded_picture(self, geometry: Geometry) -> RecordedPicture | None:
        """The recordings of a geometry; None to run without, which the report says where there are graphs.

        Without too where a callback asks for an image while its own one of the geometry is denoised.
        """
        recorded = self._recorded.get(geometry)
        if recorded is not None and recorded.busy:
            recorded = None
        if recorded is None and self._recorder.captures:
            self._recorder.not_recorded.add(f"denoising of {geometry}")
        return recorded

    def _tokens(self, hidden_states: Tensor, reference_latents: Tensor | None) -> ConditionTokens:
        return condition_tokens(
            hidden_states, self._diffusion_connector, reference_latents, self._reference_connector
        )

    def _schedule(self, steps: int) -> tuple[ScheduleTables, list[StepKind]]:
        """The schedule's modulation tables and how its steps are made, kept from one request to the next."""
        if steps not in self._schedules:
            schedule = flow_schedule(self.config.scheduler, steps)
            tables = self._dit.prepare_schedule(schedule)
            self._schedules = {steps: (tables, self._shortcuts.steps(schedule))}
        return self._schedules[steps]
