"""What a user holds: load a model, plan a picture, render it; or generate and edit in one call."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from blip3o_rt import ops, trace
from blip3o_rt.admission import require_room
from blip3o_rt.ar.engine import TokenEngine, TokenPlan, TokenPrompt
from blip3o_rt.checkpoint.load import Checkpoint, open_checkpoint
from blip3o_rt.checkpoint.source import Source
from blip3o_rt.config import ModelConfig
from blip3o_rt.connector.model import Connector
from blip3o_rt.embedded import embedded_checkpoint
from blip3o_rt.errors import GenerationError, ImageError, ParameterError
from blip3o_rt.graphs import Recorder
from blip3o_rt.images import ReferenceImage, load_reference, pixels_sha256, reference_pixels, tower_pixels
from blip3o_rt.inputs import check_noise, check_token_ids, prompt_list, reference_list, which_prompt
from blip3o_rt.isolation import Isolation, OwnSettings, check_fork
from blip3o_rt.machine import resolve_device, resolve_dtype
from blip3o_rt.metadata import generated_image, image_fields
from blip3o_rt.params import (
    DiffusionParams,
    SamplingParams,
    check_max_batch,
    check_max_prompt_tokens,
    check_seed,
    image_seeds,
)
from blip3o_rt.progress import ProgressCallback, ProgressReporter
from blip3o_rt.prompt import PromptEncoder
from blip3o_rt.random import normal_noise
from blip3o_rt.recorded_function import RecordedFunction
from blip3o_rt.rendering import Renderer
from blip3o_rt.report import Report, StageTimer
from blip3o_rt.result import Plan, Result
from blip3o_rt.switches import EXACT, FAST, check_device, check_tier, plan_switches, render_switches
from blip3o_rt.tatok.model import ImageTokenizer
from blip3o_rt.weights import weights_sha256

ImageCallback = Callable[[int, Image.Image], None]  # a picture's place in the result, and the picture
DEFAULT_MAX_PROMPT_TOKENS = 1536
OUTPUTS = ("pil", "tensor", "latent")


@dataclass(frozen=True)
class _Reference:
    """What an edit takes from its reference pictures: vocabulary ids, TA-Tok features, and latents."""

    token_ids: list[int]
    features: Tensor | None
    latents: tuple[Tensor, ...]
    sha256: tuple[str, ...]


NO_REFERENCE = _Reference([], None, (), ())


class _Run:
    """The time, progress and op usage of one call; its callbacks run under the caller's settings of torch."""

    def __init__(
        self,
        pipeline: Pipeline,
        settings: OwnSettings,
        callback: ProgressCallback | None,
        progress: bool,
        on_image: ImageCallback | None = None,
    ) -> None:
        pipeline._recorder.not_recorded.clear()
        self._pipeline = pipeline
        self.timer = StageTimer(pipeline.device)
        self.progress = ProgressReporter(callback and settings.outside(callback), progress)
        self.on_image = on_image and settings.outside(on_image)

    def __enter__(self) -> _Run:
        self._recording = ops.recording_usage()
        self._used = self._recording.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._recording.__exit__(*error)

    def report(self) -> Report:
        pipeline = self._pipeline
        dtype = "fp32" if pipeline.dtype == torch.float32 else "bf16"
        return self.timer.report(
            {op: tuple(sorted(names)) for op, names in sorted(self._used.items())},
            device=str(pipeline.device),
            dtype=dtype,
            tier=pipeline.tier,
            switches=pipeline.switches,
            not_recorded=sorted(pipeline._recorder.not_recorded),
        )


class Pipeline:
    """A loaded model. Make one with `Pipeline.load`, and use it from any thread for any number of requests.

    A request that comes while another runs waits for its turn, first come, first served. A callback may make
    requests of its own; it must not wait for one that another thread makes.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        max_batch: int = 4,
        max_prompt_tokens: int = DEFAULT_MAX_PROMPT_TOKENS,
        recorder: Recorder | None = None,
    ) -> None:
        self.config: ModelConfig = checkpoint.config
        self.dtype: torch.dtype = checkpoint.dtype
        self.device: torch.device = checkpoint.device
        self.switches: dict[str, str] = dict(checkpoint.switches)
        self.tier = FAST if self.switches else EXACT
        self._isolation = Isolation(self.device)
        self._recorder = recorder or Recorder.of(self.device)
        with self._isolation.turn():
            self._build(checkpoint, max_batch, max_prompt_tokens)

    def _build(self, checkpoint: Checkpoint, max_batch: int, max_prompt_tokens: int) -> None:
        config, weights = checkpoint.config, checkpoint.weights
        embedded = checkpoint.source == embedded_checkpoint()
        self._checkpoint = {
            "name": "embedded" if embedded else checkpoint.source.resolve().name,
            "sha256": weights_sha256(weights),
        }
        tokens = config.image_tokens.tokens_per_image
        positions = config.ar.max_position_embeddings - tokens
        longest = min(max_prompt_tokens, positions)
        self._prompts = PromptEncoder(checkpoint.tokenizer_dir, config.image_tokens, longest, positions)
        self._engine = TokenEngine(
            config.ar,
            config.image_tokens,
            weights["ar"],
            max_batch=max_batch,
            max_prompt_tokens=longest,
            recorder=self._recorder,
        )
        self._renderer = Renderer(checkpoint, self._recorder)
        self._tokenizer = (
            ImageTokenizer(config.ta_tok, weights["ta_tok"], self._recorder)
            if config.ta_tok is not None
            else None
        )
        self._feature_connector = None
        if config.edit.use_tar_siglip_features:
            connector = Connector(weights["connector"], "tar_siglip_features_connector")
            self._feature_connector = RecordedFunction("connector", connector, self._recorder)

    @classmethod
    def load(
        cls,
        path: str | Path | None = None,
        *,
        device: str = "auto",
        dtype: str = "auto",
        tier: str = EXACT,
        switches: Mapping[str, str] | None = None,
        diffusion: str | Path | None = None,
        ta_tok: str | Path | None = None,
        variant: str | None = None,
        allow_base_weights: bool = False,
        cache_dir: str | Path | None = None,
        max_batch: int = 4,
        max_prompt_tokens: int = DEFAULT_MAX_PROMPT_TOKENS,
    ) -> Pipeline:
        """Load a checkpoint in the published layout or as written by `blip3o-rt convert`.

        path: its folder; None is the embedded model. diffusion, ta_tok: the diffusion model's folder and the
        image tokenizer's file, where the checkpoint names ones that are not here. variant: which weights, as
        "fp16" of model.fp16.safetensors (None: the plain ones). allow_base_weights: draw with the diffusion
        folder's untrained transformer where the checkpoint has lost its own. device: "auto" (a GPU if
        there is one), "cpu", "cuda" or "cuda:N". dtype: "auto" (bfloat16 where the device computes in it,
        else float32), "fp32" or "bf16". tier: "exact", the published mathematics, or "fast" with the lossy
        switches that are given, as {"ar_weights": "int8"} (None: those of small cost, docs/fast-tier.md).
        cache_dir: keep the converted form of a published checkpoint there. max_batch: pictures whose tokens
        are drawn together; max_prompt_tokens: the longest prompt, counted with its template and reference
        tokens; both size the key/value cache, which is allocated here.

        Raises CheckpointError, ConfigError, DeviceError, InsufficientMemoryError or ParameterError.
        """
        check_tier(tier, switches)
        check_max_batch(max_batch)
        check_max_prompt_tokens(max_prompt_tokens)
        target = resolve_device(device)
        chosen = check_tier(tier, switches, target.type)
        check_device(chosen, target.type)
        check_fork()
        kept = resolve_dtype(dtype, target)
        folder = embedded_checkpoint() if path is None else path
        with OwnSettings(target, torch.get_num_threads()):
            opened = open_checkpoint(Source(folder, diffusion, ta_tok, variant, allow_base_weights))
            require_room(opened.config, kept, chosen, target, max_batch, max_prompt_tokens)
            checkpoint = opened.load(target, kept, switches=chosen, cache_dir=cache_dir)
        pipeline = cls(checkpoint, max_batch=max_batch, max_prompt_tokens=max_prompt_tokens)
        pipeline.prepare()
        return pipeline

    def prepare(self) -> None:
        """On a GPU, record what a request runs as graphs and compile its kernels; `load` has done so.

        Recorded are the shapes of a picture from words and of an edit of one reference picture. Other shapes
        run without a graph, which a report says.
        """
        if self.device.type == "cpu" and not self._recorder.captures:
            return
        with self._isolation.turn():
            self._renderer.prepare(edits=self._tokenizer is not None)
            if self._tokenizer is not None:
                self._tokenizer.prepare()
                if self._feature_connector is not None:
                    tower = self._tokenizer.config
                    shape = (tower.tokens, tower.hidden_size)
                    self._feature_connector.prepare(
                        torch.empty(shape, dtype=self._tokenizer.dtype, device=self.device)
                    )
            self._engine.prepare()

    def plan(
        self,
        prompt: str,
        *,
        image: ReferenceImage | Sequence[ReferenceImage] | None = None,
        seed: int = 0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 0.95,
        image_tokens_only: bool = True,
        token_ids: Tensor | Sequence[int] | None = None,
        progress: bool = False,
        callback: ProgressCallback | None = None,
    ) -> Plan:
        """Run the autoregressive stage for one picture.

        image: the reference picture (or pictures) of an edit. token_ids: [T] or [1, T] vocabulary ids to
        replay instead of sampling. seed to image_tokens_only are those of SamplingParams (top_k=1 is greedy).
        The callback is told of every token; returning False raises Cancelled between two of them.

        Raises PromptError, ImageError, ParameterError, Cancelled, or GenerationError where logits are not
        finite.
        """
        sampling = self._sampling(seed, temperature, top_k, top_p, image_tokens_only)
        self._prompts.check(prompt)
        given = None if token_ids is None else check_token_ids(token_ids, self.config)
        with self._isolation.turn() as settings, _Run(self, settings, callback, progress) as run:
            reference = NO_REFERENCE if image is None else self._look_at(image, run)
            prompts = [self._token_prompt(prompt, reference, [sampling])]
            if given is None:
                tokens = self._draw_tokens(prompts, run)[0][0]
            else:
                with trace.span("plan"):
                    tokens = self._engine.replay(prompts[0], given)
        plan = self._plan(prompt, prompts[0], sampling, tokens, reference)
        plan = dataclasses.replace(plan, replayed=given is not None)
        if plan.error is not None:
            raise plan.error
        return plan

    def render(
        self,
        plan: Plan,
        *,
        seed: int | None = None,
        steps: int = 30,
        guidance: float = 2.0,
        noise: Tensor | None = None,
        output: str = "pil",
        progress: bool = False,
        callback: ProgressCallback | None = None,
    ) -> Image.Image | Tensor:
        """Run the diffusion stage and the decoder for one plan.

        seed: of the noise; None is the plan's. noise: [1, C, h, w], overrides the seed. output: "pil",
        "tensor" ([1, 3, H, W] float32 in 0..1) or "latent" ([1, C, h, w] float32). The callback is told of
        every step; returning False raises Cancelled between two of them.

        Raises ParameterError or Cancelled, or the plan's own GenerationError.
        """
        if output not in OUTPUTS:
            raise ParameterError(f"output is {output!r}: accepted are {', '.join(OUTPUTS)}")
        params = DiffusionParams(steps, guidance)
        seed = plan.sampling.seed if seed is None else check_seed(seed)
        fields = self._fields(plan, params, seed, noise_given=noise is not None)
        if noise is not None:
            noise = check_noise(noise, self._renderer.latent_shape)
        with (
            self._isolation.turn() as settings,
            trace.span("render"),
            _Run(self, settings, callback, progress) as run,
        ):
            noise = self._noise(seed) if noise is None else noise
            latent = self._denoise(plan, params, noise, run)
            if output == "latent":
                return latent
            pixels = self._decode(latent, run)
        return pixels if output == "tensor" else generated_image(pixels, fields)

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        n: int = 1,
        seed: int = 0,
        steps: int = 30,
        guidance: float = 2.0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 0.95,
        image_tokens_only: bool = True,
        progress: bool = False,
        callback: ProgressCallback | None = None,
        on_image: ImageCallback | None = None,
    ) -> Result:
        """Draw n pictures of every prompt; picture i of a prompt uses seed + i for its tokens and its noise.

        The pictures come in the order of the prompts, all n of the first one first; on_image is given each as
        soon as it is drawn. A picture does not depend on the others of the call.

        Raises PromptError or ParameterError before any work; Cancelled; GenerationError where a picture
        fails, after the others are done, with them in its `images`.
        """
        sampling = self._sampling(seed, temperature, top_k, top_p, image_tokens_only)
        params = DiffusionParams(steps, guidance)
        return self._pictures(prompt_list(prompt), None, n, sampling, params, progress, callback, on_image)

    def edit(
        self,
        prompt: str,
        reference: ReferenceImage | Sequence[ReferenceImage],
        *,
        n: int = 1,
        seed: int = 0,
        steps: int = 30,
        guidance: float = 2.0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 0.95,
        image_tokens_only: bool = True,
        progress: bool = False,
        callback: ProgressCallback | None = None,
        on_image: ImageCallback | None = None,
    ) -> Result:
        """Draw n pictures of what the prompt makes of the reference picture; otherwise as `generate`.

        Raises ImageError where the reference cannot be used, and what `generate` raises.
        """
        sampling = self._sampling(seed, temperature, top_k, top_p, image_tokens_only)
        params = DiffusionParams(steps, guidance)
        return self._pictures(
            [prompt], reference_list(reference), n, sampling, params, progress, callback, on_image
        )

    def _pictures(
        self,
        prompts: list[str],
        references: list[ReferenceImage] | None,
        n: int,
        sampling: SamplingParams,
        params: DiffusionParams,
        progress: bool,
        callback: ProgressCallback | None,
        on_image: ImageCallback | None,
    ) -> Result:
        samples = [dataclasses.replace(sampling, seed=seed) for seed in image_seeds(sampling.seed, n)]
        for index, prompt in enumerate(prompts):
            with which_prompt(index, len(prompts)):
                self._prompts.check(prompt)
        with (
            self._isolation.turn() as settings,
            _Run(self, settings, callback, progress, on_image) as run,
        ):
            reference = NO_REFERENCE if references is None else self._look_at(references, run)
            token_prompts = []
            for index, prompt in enumerate(prompts):
                with which_prompt(index, len(prompts)):
                    token_prompts.append(self._token_prompt(prompt, reference, samples))
            plans = [
                self._plan(prompt, token_prompt, sample, tokens, reference)
                for prompt, token_prompt, drawn in zip(
                    prompts, token_prompts, self._draw_tokens(token_prompts, run), strict=True
                )
                for sample, tokens in zip(samples, drawn, strict=True)
            ]
            pictures: list[Image.Image | None] = []
            for index, plan in enumerate(plans):
                picture = self._picture(plan, params, run) if plan.error is None else None
                if picture is not None and run.on_image is not None:
                    run.on_image(index, picture)
                pictures.append(picture)
        errors = [plan.error for plan in plans if plan.error is not None]
        if errors:
            raise GenerationError(
                f"{len(errors)} of {len(plans)} pictures failed: {errors[0]}", images=pictures
            )
        return Result([picture for picture in pictures if picture is not None], plans, run.report())

    @trace.spanned("render")
    def _picture(self, plan: Plan, params: DiffusionParams, run: _Run) -> Image.Image:
        seed = plan.sampling.seed
        latent = self._denoise(plan, params, self._noise(seed), run)
        return generated_image(self._decode(latent, run), self._fields(plan, params, seed))

    def _sampling(
        self, seed: int, temperature: float, top_k: int | None, top_p: float, image_tokens_only: bool
    ) -> SamplingParams:
        sampling = SamplingParams(seed, temperature, top_k, top_p, image_tokens_only)
        sampling.top_k_for(self.config.image_tokens.num_image_tokens, self.config.ar.vocab_size)
        return sampling

    def _token_prompt(self, prompt: str, reference: _Reference, samples: list[SamplingParams]) -> TokenPrompt:
        if not reference.token_ids:
            return TokenPrompt(self._prompts.text_to_image(prompt), samples)
        ids = self._prompts.edit(prompt, reference.token_ids)
        span = self._prompts.image_positions(ids, reference.token_ids)
        return TokenPrompt(ids, samples, reference.features, span)

    @trace.spanned("plan")
    def _draw_tokens(self, prompts: list[TokenPrompt], run: _Run) -> list[list[TokenPlan]]:
        count = self.config.image_tokens.tokens_per_image * sum(len(prompt.samples) for prompt in prompts)
        with run.timer.stage("tokens", count), run.progress.stage("tokens", count) as update:
            return self._engine.generate(prompts, lambda done, _: update(done))

    def _plan(
        self,
        prompt: str,
        token_prompt: TokenPrompt,
        sampling: SamplingParams,
        tokens: TokenPlan,
        reference: _Reference,
    ) -> Plan:
        image_tokens = self.config.image_tokens.image_token_range
        return Plan(
            prompt=prompt,
            prompt_ids=torch.tensor([token_prompt.ids]),
            token_ids=tokens.token_ids[None].cpu(),
            hidden_states=tokens.hidden_states[None],
            sampling=sampling,
            reference_latents=reference.latents,
            reference_sha256=reference.sha256,
            non_image_positions=tuple(
                position
                for position, token in enumerate(tokens.token_ids.tolist())
                if token not in image_tokens
            ),
            switches=plan_switches(self.switches),
            error=tokens.error,
        )

    @trace.spanned("reference")
    def _look_at(self, images: ReferenceImage | Sequence[ReferenceImage], run: _Run) -> _Reference:
        """Encode the reference pictures of an edit in the ways the checkpoint was trained with."""
        pictures = [load_reference(image) for image in reference_list(images)]
        if self._tokenizer is None:
            raise ImageError(
                "this checkpoint has no image tokenizer and only draws from text: leave the image out"
            )
        if len(pictures) > 1 and self._renderer.sees_reference:
            raise ImageError(
                f"this checkpoint edits one reference picture at a time; {len(pictures)} were given"
            )
        with run.timer.stage("reference", len(pictures)):
            size = self._tokenizer.config.image_size
            encoded = [self._tokenizer.encode(tower_pixels(picture, size)) for picture in pictures]
            start = self.config.image_tokens.image_token_range.start
            ids = [start + code for _, codes in encoded for code in codes.flatten().tolist()]
            features = None
            if self._feature_connector is not None:
                features = self._feature_connector(torch.cat([found.flatten(0, 1) for found, _ in encoded]))
                ids = [self._prompts.image_pad_id] * len(ids)  # their embeddings are the features
            latents: tuple[Tensor, ...] = ()
            if self._renderer.takes_references:
                latents = tuple(
                    self._renderer.encode(reference_pixels(picture, self.config.image_size))
                    for picture in pictures
                )
        return _Reference(ids, features, latents, tuple(pixels_sha256(picture) for picture in pictures))

    def _denoise(self, plan: Plan, params: DiffusionParams, noise: Tensor, run: _Run) -> Tensor:
        with run.timer.stage("denoise", params.steps), run.progress.stage("denoise", params.steps) as update:
            return self._renderer.denoise(
                plan.hidden_states[0],
                plan.reference_latents,
                noise,
                params,
                callback=lambda done, _: update(done),
            )

    def _decode(self, latent: Tensor, run: _Run) -> Tensor:
        with run.timer.stage("decode", 1), run.progress.stage("decode", 1) as update:
            pixels = self._renderer.decode(latent)
            update(1)
            return pixels

    def _noise(self, seed: int) -> Tensor:
        return normal_noise(seed, self._renderer.latent_shape)

    def _fields(
        self, plan: Plan, params: DiffusionParams, seed: int, *, noise_given: bool = False
    ) -> dict[str, object]:
        """The metadata of a picture: how it was drawn, and what of it came from the caller."""
        drawn: dict[str, object] = {"tokens": "given"}
        if not plan.replayed:
            codes, words = self.config.image_tokens.num_image_tokens, self.config.ar.vocab_size
            drawn = {**dataclasses.asdict(plan.sampling), "top_k": plan.sampling.top_k_for(codes, words)}
            drawn["token_seed"] = drawn.pop("seed")
        if noise_given:
            drawn["noise"] = "given"
        switches = {**plan.switches, **render_switches(self.switches)}
        if switches:
            drawn |= {"tier": FAST, "switches": switches}
        origin = {
            "task": "edit" if plan.reference_sha256 else "text-to-image",
            "references": list(plan.reference_sha256),
            "checkpoint": dict(self._checkpoint),
            "dtype": "fp32" if self.dtype == torch.float32 else "bf16",
            "device": self.device.type,
        }
        return image_fields(plan.prompt, seed, {**drawn, **dataclasses.asdict(params)}, **origin)
