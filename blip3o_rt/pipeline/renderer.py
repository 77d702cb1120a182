"""The second stage of an image: `Plan` -> latent -> pixels -> image."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from blip3o_rt.checkpoint.load import Checkpoint
from blip3o_rt.config import ModelConfig
from blip3o_rt.connector.model import Connector
from blip3o_rt.dit.captured import CapturedImages, Geometry, images_of_a_small_step, images_of_a_step
from blip3o_rt.dit.conditioning import ConditionTokens, condition_tokens
from blip3o_rt.dit.denoise import Denoising, step_together
from blip3o_rt.dit.model import DiT, ScheduleTables
from blip3o_rt.dit.schedule import flow_schedule
from blip3o_rt.dit.shortcuts import Shortcuts
from blip3o_rt.dit.step import EagerSteps, StepKind, StepState
from blip3o_rt.embedded import embedded_checkpoint
from blip3o_rt.errors import GenerationError, ImageError, ParameterError, shown
from blip3o_rt.graphs import GraphRunner
from blip3o_rt.images import reference_pixels
from blip3o_rt.metadata import generated_image, image_fields
from blip3o_rt.ops.random import normal_noise
from blip3o_rt.params import DiffusionParams, SamplingParams, check_dense
from blip3o_rt.result import Plan, Run
from blip3o_rt.switches import FAST, VAE_TILES, render_switches, setting
from blip3o_rt.vae.model import Autoencoder
from blip3o_rt.weights import weights_sha256

PLAN_FIELDS: dict[str, Any] = {  # and their types, which a plan that a program put together may not have
    "prompt": str,
    "hidden_states": Tensor,
    "sampling": SamplingParams,
    "reference_latents": tuple | list,
    "reference_sha256": tuple | list,
    "replayed": bool,
    "switches": Mapping,
    "error": GenerationError | None,
}


def sees_reference(config: ModelConfig) -> bool:
    """Whether the transformer sees an edit's reference latent beside the noisy one."""
    return config.edit.use_und_image_vae_as_noise or config.dit.in_channels == 2 * config.vae.latent_channels


def latent_shape(config: ModelConfig) -> tuple[int, int, int, int]:
    """[1, C, h, w] of an image's noise and latent."""
    side = config.dit.sample_size
    return (1, config.vae.latent_channels, side, side)


def captured_geometries(config: ModelConfig, *, edits: bool) -> list[Geometry]:
    """Geometries to capture, the largest first: an edit of one reference, and text-to-image."""
    noise = latent_shape(config)
    text_to_image = Geometry(noise, (config.image_tokens.tokens_per_image + 1, config.ar.hidden_size))
    side = config.image_size // config.vae.compression
    reference = (1, noise[1], side, side)
    edit = dataclasses.replace(
        text_to_image,
        concat_latent=reference if sees_reference(config) else None,
        condition_latents=reference if config.edit.use_und_image_vae else None,
    )
    edit_geometries = [edit] if edits and edit != text_to_image else []
    return [*edit_geometries, *([text_to_image] if config.dit.in_channels == noise[1] else [])]


class Renderer:
    """Connectors, diffusion transformer and autoencoder of a checkpoint: plans to pixels."""

    def __init__(self, checkpoint: Checkpoint, runner: GraphRunner) -> None:
        config, weights, switches = checkpoint.config, checkpoint.weights, checkpoint.switches
        self.config = config
        self.latent_shape = latent_shape(config)
        self.sees_reference = sees_reference(config)  # beside the noise, as columns or as further channels
        self.takes_references = config.edit.use_und_image_vae or self.sees_reference
        self._device = checkpoint.device
        self._hidden_dtype = checkpoint.dtype
        self._switches = render_switches(switches)
        embedded = checkpoint.source == embedded_checkpoint()
        self._origin: dict[str, Any] = {
            "checkpoint": {
                "name": "embedded" if embedded else checkpoint.source.resolve().name,
                "sha256": weights_sha256(weights),
            },
            "dtype": checkpoint.precision.name,
            "device": checkpoint.device.type,
        }
        self._weights = weights
        self._runner = runner
        self._diffusion_connector = Connector(weights["connector"], "diffusion_connector")
        self._reference_connector = None
        if config.edit.use_und_image_vae:
            self._reference_connector = Connector(weights["connector"], "und_image_vae_connector")
        self._dit = DiT(config.dit, weights["dit"])
        self._vae = Autoencoder(config.vae, weights["vae"], runner, setting(switches, VAE_TILES) or 1)
        self._shortcuts = Shortcuts.of(switches)
        self._schedules: dict[int, tuple[ScheduleTables, list[StepKind]]] = {}
        self._captured: dict[Geometry, CapturedImages] = {}
        self.images_per_step = 1  # on a GPU, until it captures
        if self._device.type == "cpu":
            self.images_per_step = images_of_a_small_step(config.dit, captured_geometries(config, edits=True))

    def refresh(self) -> None:
        """Forget what is kept of the weights, which have been updated in place."""
        self._schedules.clear()
        self._origin["checkpoint"] = {**self._origin["checkpoint"], "sha256": weights_sha256(self._weights)}

    def capture(self, *, edits: bool) -> None:
        """Capture text-to-image and, with `edits`, an edit of one reference image.

        Without graphs each is run once, which compiles its kernels. Other geometries run eagerly.
        """
        self._vae.capture_decode(*self.latent_shape[2:])  # the largest first: all share its memory
        if edits and self.takes_references:
            self._vae.capture_encode(self.config.image_size, self.config.image_size)
        geometries = captured_geometries(self.config, edits=edits)
        if self._device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self._device)
            self.images_per_step = images_of_a_step(self._dit, geometries, free)
        for geometry in geometries:
            captured = CapturedImages(
                self._dit,
                geometry,
                self._tokens,
                self._hidden_dtype,
                self._runner,
                self._shortcuts.kinds,
                self.images_per_step,
            )
            if self._runner.captures:
                self._captured[geometry] = captured
            else:
                captured.run_once()

    def reference_latents(self, images: Sequence[Image.Image]) -> tuple[Tensor, ...]:
        """The latents [1, C, h, w] of an edit's reference images, none where the checkpoint takes none.

        Raises ImageError for more images than it takes.
        """
        if len(images) > 1 and self.sees_reference:
            raise ImageError(f"this checkpoint edits one reference image at a time; {len(images)} were given")
        size = self.config.image_size
        taken = images if self.takes_references else []
        return tuple(self._vae.encode(reference_pixels(image, size)) for image in taken)

    def image(
        self, plan: Plan, params: DiffusionParams, seed: int, run: Run, noise: Tensor | None = None
    ) -> Image.Image:
        """The image of a plan, with its metadata in `info`. Raises as `pixels`."""
        (pixels,) = self.pixels([plan], params, [self.noise(seed) if noise is None else noise], run)
        return generated_image(pixels, self.fields(plan, params, seed, noise_given=noise is not None))

    def pixels(
        self, plans: Sequence[Plan], params: DiffusionParams, noises: Sequence[Tensor], run: Run
    ) -> Iterator[Tensor]:
        """The pixels [1, 3, H, W] of every plan, float32 in 0..1; some plans share steps.

        Raises GenerationError where they are not finite.
        """
        for first in range(0, len(plans), self.images_per_step):
            sharing = slice(first, first + self.images_per_step)
            for latent in self._denoised(plans[sharing], params, noises[sharing], run):
                with run.stage("decode", 1) as update:
                    pixels = self.decode(latent)
                    update(1)
                yield pixels

    def latent(self, plan: Plan, params: DiffusionParams, noise: Tensor, run: Run) -> Tensor:
        """The latent [1, C, h, w], float32. Raises GenerationError where it is not finite."""
        (latent,) = self._denoised([plan], params, [noise], run)
        check_finite(latent)
        return latent

    def noise(self, seed: int) -> Tensor:
        """The noise [1, C, h, w] of a seed, float32."""
        return normal_noise(seed, self.latent_shape)

    def decode(self, latent: Tensor) -> Tensor:
        """The pixels [1, 3, H, W] in 0..1 of a latent. Raises GenerationError where either is not finite."""
        pixels = self._vae.decode(latent)
        check_finite(latent, pixels)
        return pixels

    def _denoised(
        self, plans: Sequence[Plan], params: DiffusionParams, noises: Sequence[Tensor], run: Run
    ) -> list[Tensor]:
        with run.stage("denoise", params.steps * len(plans)) as update, ExitStack() as stack:
            pairs = zip(plans, noises, strict=True)
            images = [stack.enter_context(self.denoising(plan, params, noise)) for plan, noise in pairs]
            for step in range(params.steps):
                step_together(images)
                update((step + 1) * len(images))
            return [image.latent for image in images]

    @contextmanager
    def denoising(self, plan: Plan, params: DiffusionParams, noise: Tensor) -> Iterator[Denoising]:
        """The denoising of one plan, before its first step; the buffers are its own within the block.

        It runs eagerly where its geometry was not captured or all its buffers are in use. Where there are
        graphs, the report says so.
        """
        hidden_states, references = plan.hidden_states[0].to(self._device), plan.reference_latents
        concat_latent = references[0] if references and self.sees_reference else None
        cross = bool(references) and self._reference_connector is not None
        condition_latents = torch.cat(references) if cross else None
        tables, kinds = self._schedule(params.steps)
        geometry = Geometry.of(noise, hidden_states, concat_latent, condition_latents)
        captured = self._captured.get(geometry)
        image = None if captured is None else captured.free
        if captured is None or image is None:
            if self._runner.captures:
                self._runner.note_eager(f"denoising of {geometry}")
            condition = self._dit.condition(self._tokens(hidden_states, condition_latents))
            state = StepState.begin(self._dit, noise, tables, condition, params.guidance, concat_latent)
            yield Denoising(EagerSteps(self._dit), state, tables, kinds)
            return
        with image.in_use():
            image.condition(hidden_states, condition_latents)
            image.begin(noise, tables, params.guidance, concat_latent)
            yield Denoising(captured, image.state, tables, kinds)

    def _tokens(self, hidden_states: Tensor, reference_latents: Tensor | None) -> ConditionTokens:
        return condition_tokens(
            hidden_states, self._diffusion_connector, reference_latents, self._reference_connector
        )

    def _schedule(self, steps: int) -> tuple[ScheduleTables, list[StepKind]]:
        """The schedule's modulation tables and how its steps are made, kept from one request to the next."""
        if steps not in self._schedules:
            schedule = flow_schedule(self.config.scheduler, steps)
            tables = self._dit.schedule_tables(schedule)
            self._schedules = {steps: (tables, self._shortcuts.steps(schedule))}
        return self._schedules[steps]

    def check_noise(self, noise: Tensor) -> Tensor:
        """The noise in float32.

        Raises ParameterError unless it is a floating-point tensor of the latent's shape that stays finite.
        """
        check_tensor("noise", noise, self.latent_shape)
        noise = noise.detach().to(torch.float32)
        if not bool(torch.isfinite(noise).all()):
            raise ParameterError(
                "noise has values that are not finite in float32: accepted are finite numbers"
            )
        return noise

    def check_plan(self, plan: Plan) -> None:
        """Raise ParameterError for what is no plan of this checkpoint's widths, and the plan's own error."""
        if not isinstance(plan, Plan):
            raise ParameterError(f"plan is {shown(plan)}: accepted is what Pipeline.plan returns")
        for name, kind in PLAN_FIELDS.items():
            if not isinstance(value := getattr(plan, name), kind):
                raise ParameterError(f"plan.{name} is {shown(value)}: accepted is a plan as it was made")
        if plan.error is not None:
            raise plan.error
        check_tensor("plan.hidden_states", plan.hidden_states, (1, None, self.config.ar.hidden_size))
        for latent in plan.reference_latents:
            check_tensor("plan.reference_latents", latent, self.latent_shape)

    def fields(
        self, plan: Plan, params: DiffusionParams, seed: int, *, noise_given: bool = False
    ) -> dict[str, Any]:
        """The metadata of an image: how it was drawn, of what checkpoint, and what came from the caller."""
        drawn: dict[str, Any] = {"tokens": "given"}
        if not plan.replayed:
            sizes = self.config.image_tokens.num_image_tokens, self.config.ar.vocab_size
            drawn = {**dataclasses.asdict(plan.sampling), "top_k": plan.sampling.top_k_for(*sizes)}
            drawn["token_seed"] = drawn.pop("seed")
        if noise_given:
            drawn["noise"] = "given"
        switches = {**plan.switches, **self._switches}
        if switches:
            drawn |= {"tier": FAST, "switches": switches}
        origin = {
            "task": "edit" if plan.reference_sha256 else "text-to-image",
            "references": list(plan.reference_sha256),
            **self._origin,
        }
        return image_fields(plan.prompt, seed, {**drawn, **dataclasses.asdict(params)}, **origin)


def check_tensor(name: str, tensor: object, shape: tuple[int | None, ...]) -> None:
    """Raise ParameterError for what is no dense floating-point tensor of a shape, where None is 1 or more."""
    accepted = f"accepted is a floating-point tensor {['any' if n is None else n for n in shape]}"
    if not isinstance(tensor, Tensor):
        raise ParameterError(f"{name} is {shown(tensor)}: {accepted}")
    check_dense(name, tensor)
    fits = [n == m if m is not None else n > 0 for n, m in zip(tensor.shape, shape, strict=False)]
    if tensor.ndim != len(shape) or not all(fits) or not tensor.is_floating_point():
        raise ParameterError(f"{name} is {tensor.dtype} {list(tensor.shape)}: {accepted} of this checkpoint")


def check_finite(latent: Tensor, pixels: Tensor | None = None) -> None:
    """Raise GenerationError for a latent or pixels that are not finite, read back once, at the end."""
    found = [latent] if pixels is None else [latent, pixels]
    finite = torch.stack([tensor.isfinite().all() for tensor in found]).tolist()
    if not all(finite):
        what = "the diffusion transformer's latent" if not finite[0] else "the autoencoder's image"
        raise GenerationError(
            f"{what} is not finite: the checkpoint's weights are damaged or overflow in this dtype"
        )
