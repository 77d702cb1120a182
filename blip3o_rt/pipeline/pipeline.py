"""What a user holds: load a model, plan an image, render it; or generate and edit in one call."""

from __future__ import annotations

import dataclasses
import gc
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from PIL import Image
from torch import Tensor

from blip3o_rt import ops, trace
from blip3o_rt.checkpoint.load import Checkpoint, open_checkpoint
from blip3o_rt.checkpoint.source import Source
from blip3o_rt.config import ModelConfig
from blip3o_rt.embedded import embedded_checkpoint
from blip3o_rt.errors import AsleepError, Blip3oError, GenerationError, ParameterError, shown
from blip3o_rt.graphs import GraphRunner
from blip3o_rt.images import ReferenceImage, load_reference
from blip3o_rt.isolation import Isolation, OwnSettings, check_fork
from blip3o_rt.machine import resolve_device
from blip3o_rt.metadata import eight_bit
from blip3o_rt.ops import bf16_products
from blip3o_rt.params import (
    AUTO,
    DEFAULT_BATCH,
    DEFAULT_PROMPT_TOKENS,
    OUTPUTS,
    DiffusionParams,
    SamplingParams,
    check_callback,
    check_choice,
    check_draft_window,
    check_flag,
    check_max_batch,
    check_max_prompt_tokens,
    check_seed,
    image_seeds,
    prompt_list,
    reference_list,
    which_prompt,
)
from blip3o_rt.pipeline.memory import require_model_memory
from blip3o_rt.pipeline.planner import NO_REFERENCE, Planner, PlanRequest, Reference
from blip3o_rt.pipeline.renderer import Renderer
from blip3o_rt.precision import BF16, resolve_precision
from blip3o_rt.result import ImageCallback, Plan, ProgressCallback, Result, Run
from blip3o_rt.rl.rollout import BATCHES, Rollout, Rollouts, references_of
from blip3o_rt.rl.update import NewWeights, WeightStore
from blip3o_rt.switches import EXACT, FAST, check_device, check_tier

References: TypeAlias = "ReferenceImage | Sequence[ReferenceImage]"
SAMPLING, DIFFUSION = SamplingParams(), DiffusionParams()  # the defaults


@dataclass(frozen=True)
class ImageRequest:
    """One image of a batch of unlike ones: an edit where there is a reference image (or several)."""

    prompt: str
    seed: int = SAMPLING.seed
    reference: References | None = None


class Asleep:
    """What stands in the place of a sleeping pipeline's stages."""

    def __getattr__(self, name: str) -> Any:
        raise AsleepError("the pipeline sleeps: call wake() first")


class Pipeline:
    """A loaded model. Make one with `Pipeline.load`, and use it from any thread for any number of requests.

    A request that comes while another runs waits for its turn, first come, first served. A callback may make
    requests of its own; it must not wait for one that another thread makes.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        max_batch: int = DEFAULT_BATCH,
        max_prompt_tokens: int = DEFAULT_PROMPT_TOKENS,
        runner: GraphRunner | None = None,
    ) -> None:
        self.config: ModelConfig = checkpoint.config
        self.dtype: torch.dtype = checkpoint.dtype
        self.precision: str = checkpoint.precision.name
        self.device: torch.device = checkpoint.device
        self.switches: dict[str, str] = dict(checkpoint.switches)
        self.tier = FAST if self.switches else EXACT
        self._checkpoint = dataclasses.replace(checkpoint, weights={})  # all but the weights
        self._sizes = {"max_batch": check_max_batch(max_batch), "max_prompt_tokens": max_prompt_tokens}
        self._requests = 0  # that run: one, or with those of its callbacks
        self._given_runner = runner
        self._isolation = Isolation(self.device)
        with self._isolation.turn():
            self._build(checkpoint.weights)

    def _build(self, weights: Mapping[str, Mapping[str, Tensor]], version: int = 0) -> None:
        """Make the stages over weights on the device."""
        self._weights = WeightStore(self._checkpoint, weights, version)
        checkpoint = dataclasses.replace(self._checkpoint, weights={**self._weights.weights})
        self._runner = self._given_runner or GraphRunner.of(self.device)
        self._planner = Planner(checkpoint, self._runner, **self._sizes)
        self._renderer = Renderer(checkpoint, self._runner)

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
        max_batch: int = DEFAULT_BATCH,
        max_prompt_tokens: int = DEFAULT_PROMPT_TOKENS,
    ) -> Pipeline:
        """Load a checkpoint in the published layout or as written by `blip3o-rt convert`.

        Args:
            path: Its folder; None is the embedded model.
            device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N".
            dtype: "fp32", "bf16", "mixed" (bfloat16 weights and float32 arithmetic, on the CPU) or "auto":
                bf16 where the device computes in it, else float32 arithmetic with the weights as stored.
            tier: "exact", the published mathematics, or "fast", with lossy switches.
            switches: Those of the fast tier, as {"ar_weights": "int8"}; None is those of small cost.
            diffusion: The diffusion model's folder, where the checkpoint names one that is not here.
            ta_tok: The image tokenizer's file, where the checkpoint names one that is not here.
            variant: Which weights, as "fp16" of model.fp16.safetensors; None is the plain ones.
            allow_base_weights: Whether to draw with the diffusion folder's untrained transformer where the
                checkpoint has lost its own.
            cache_dir: Folder in which to keep the converted form of a published checkpoint.
            max_batch: Images whose tokens are sampled together; sizes the key/value cache.
            max_prompt_tokens: Longest prompt with its template and reference tokens; sizes the cache too.

        Raises:
            CheckpointError: The checkpoint is missing, damaged or contradicts itself.
            ConfigError: Its configuration has a value that is not supported.
            DeviceError: The device is not here.
            ForkError: The process is a fork of one that had loaded a pipeline.
            InsufficientMemoryError: The model does not fit.
            ParameterError: An argument is wrong.
        """
        check_max_batch(max_batch)
        check_max_prompt_tokens(max_prompt_tokens)
        check_flag("allow_base_weights", allow_base_weights)
        folder = embedded_checkpoint() if path is None else path
        source = Source(folder, diffusion, ta_tok, variant, allow_base_weights)
        check_tier(tier, switches)
        check_fork()
        target = resolve_device(device)
        resolve_precision(dtype, target)
        chosen = check_tier(tier, switches, target.type)
        check_device(chosen, target.type)
        with OwnSettings(target, torch.get_num_threads()):
            opened = open_checkpoint(source)
            precision = resolve_precision(dtype, target, opened.stored_dtype)
            require_model_memory(opened.config, precision, chosen, target, max_batch, max_prompt_tokens)
            checkpoint = opened.load(target, precision, switches=chosen, cache_dir=cache_dir)
        if target.type == "cpu" and precision is BF16:
            bf16_products.slower()  # what must be measured is measured now, not in a request
        pipeline = cls(checkpoint, max_batch=max_batch, max_prompt_tokens=max_prompt_tokens)
        pipeline.warm_up()
        return pipeline

    def warm_up(self) -> None:
        """On a GPU, compile kernels and capture what a request runs as graphs; `load` has done so.

        Captured are text-to-image and an edit of one reference image. Other shapes run eagerly, which a
        report says.
        """
        if self.device.type == "cpu" and not self._runner.captures:
            return
        with self._isolation.turn():
            self._renderer.capture(edits=self._planner.edits)
            self._planner.capture()

    def prepare(self) -> None:
        """Deprecated: `warm_up`."""
        warnings.warn("Pipeline.prepare is deprecated: use warm_up", DeprecationWarning, stacklevel=2)
        self.warm_up()

    @property
    def max_batch(self) -> int:
        """Images whose tokens are sampled together."""
        return self._sizes["max_batch"]

    @property
    def weights_version(self) -> int:
        """How often the weights have been updated."""
        return self._weights.version

    def weights_checksum(self) -> str:
        """A hash of all weights as they are held: of one checkpoint, dtype and tier the same everywhere."""
        with self._isolation.turn():
            return self._weights.checksum()

    def update_weights(self, weights: NewWeights) -> int:
        """Replace weights in place; what is captured, packed and quantized stays valid.

        Requests before it in the queue use the old weights, those behind it the new ones. After an error the
        old ones are all there.

        Args:
            weights: Tensors by their names in the published checkpoint, of any floating dtype and device: a
                mapping, or pairs as `named_parameters()` gives. Weights that are not named stay. Or the
                folder of a checkpoint of the same configuration.

        Returns:
            The new `weights_version`.

        Raises:
            CheckpointError: A name that is unknown, a wrong shape, or values that are not finite.
            ParameterError: What is no weights at all, or a call from a callback of a request.
        """
        with OwnSettings(self.device, torch.get_num_threads()):
            staged = self._weights.stage(weights)
        with self._isolation.turn():
            if self._requests or (not self.asleep and self._planner.engine.busy):
                raise ParameterError("weights cannot be updated from within a request: do it after it")
            self._weights.apply(staged)
            if not self.asleep:
                self._renderer.refresh()
            return self._weights.version

    @property
    def asleep(self) -> bool:
        """Whether `sleep` was called, and not `wake` since."""
        return isinstance(self._planner, Asleep)

    def sleep(self) -> None:
        """Release caches, workspaces and graphs, and on a GPU the weights' memory, which move to the host's.

        Waits for its turn. Until `wake`, requests raise AsleepError; weights may be updated.

        Raises ParameterError for a call from a callback of a request.
        """
        with self._isolation.turn():
            if self._requests:
                raise ParameterError("a pipeline cannot sleep within a request: let it end first")
            if self.asleep:
                return
            host = torch.device("cpu")
            checkpoint = dataclasses.replace(self._checkpoint, device=host)
            self._weights = WeightStore(checkpoint, self._weights.on(host), self._weights.version)
            self._planner = self._renderer = cast(Any, Asleep())
            self._runner = GraphRunner(None)
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def wake(self) -> None:
        """Take the memory back and be ready as after `load`; of one that does not sleep, nothing."""
        with self._isolation.turn():
            if not self.asleep:
                return
            self._build(self._weights.on(self.device), self._weights.version)
        self.warm_up()

    def plan(
        self,
        prompt: str,
        *,
        image: References | None = None,
        seed: int = SAMPLING.seed,
        temperature: float = SAMPLING.temperature,
        top_k: int | None = SAMPLING.top_k,
        top_p: float = SAMPLING.top_p,
        image_tokens_only: bool = SAMPLING.image_tokens_only,
        draft_window: int | str = AUTO,
        token_ids: Tensor | Sequence[int] | None = None,
        progress: bool = False,
        callback: ProgressCallback | None = None,
    ) -> Plan:
        """Run the autoregressive stage for one image.

        Args:
            prompt: What to draw, or what to change.
            image: The reference image (or images) of an edit.
            seed: Of tokens and noise.
            temperature: Divides the logits.
            top_k: How many tokens sampling keeps; None is the published number, 0 is all, 1 is greedy.
            top_p: Probability mass that sampling keeps.
            image_tokens_only: Whether only image tokens can be sampled.
            draft_window: Rows of an image in a pass of the decoder, 1 to 16; 1 draws one token a pass.
                "auto" chooses what is quickest. The image is the same bit for bit.
            token_ids: [T] or [1, T] vocabulary ids to replay instead of sampling.
            progress: Whether to draw a progress bar.
            callback: Told of every token; returning False raises Cancelled between two of them.

        Raises:
            PromptError: The prompt is empty or too long.
            ImageError: The reference image cannot be used.
            ParameterError: Another argument is wrong.
            Cancelled: The callback returned False.
            GenerationError: The logits are not finite.
        """
        sampling = SamplingParams(
            seed=seed, temperature=temperature, top_k=top_k, top_p=top_p, image_tokens_only=image_tokens_only
        )
        self._planner.check([prompt], sampling)
        given = None if token_ids is None else self._planner.check_token_ids(token_ids)
        window = check_draft_window(draft_window)
        references = None if image is None else reference_list(image)
        with self._run(progress, callback) as run:
            (request,) = self._plan_requests([prompt], [references], [sampling], window, run)
            if given is None:
                (plan,) = self._planner.plans([request], run)
            else:
                plan = self._planner.replay(request, given)
        if plan.error is not None:
            raise plan.error
        return plan

    def render(
        self,
        plan: Plan,
        *,
        seed: int | None = None,
        steps: int = DIFFUSION.steps,
        guidance: float = DIFFUSION.guidance,
        noise: Tensor | None = None,
        output: str = "pil",
        progress: bool = False,
        callback: ProgressCallback | None = None,
    ) -> Image.Image | Tensor:
        """Run the diffusion stage and the decoder for one plan.

        Args:
            plan: What `plan` returned.
            seed: Of the noise; None is the plan's.
            steps: Denoising steps.
            guidance: Scale of classifier-free guidance.
            noise: [1, C, h, w], overrides the seed.
            output: "pil", "tensor" ([1, 3, H, W] float32 in 0..1) or "latent" ([1, C, h, w] float32).
            progress: Whether to draw progress bars.
            callback: Told of every step; returning False raises Cancelled between two of them.

        Raises:
            ParameterError: An argument is wrong.
            Cancelled: The callback returned False.
            GenerationError: The plan failed, or the image is not finite.
        """
        check_choice("output", output, OUTPUTS)
        params = DiffusionParams(steps=steps, guidance=guidance)
        self._renderer.check_plan(plan)
        seed = plan.sampling.seed if seed is None else check_seed(seed)
        noise = None if noise is None else self._renderer.check_noise(noise)
        with self._run(progress, callback) as run, trace.span("render"):
            if output == "pil":
                return self._renderer.image(plan, params, seed, run, noise)
            noise = self._renderer.noise(seed) if noise is None else noise
            if output == "latent":
                return self._renderer.latent(plan, params, noise, run)
            return next(self._renderer.pixels([plan], params, [noise], run))

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        n: int = 1,
        seed: int = SAMPLING.seed,
        steps: int = DIFFUSION.steps,
        guidance: float = DIFFUSION.guidance,
        temperature: float = SAMPLING.temperature,
        top_k: int | None = SAMPLING.top_k,
        top_p: float = SAMPLING.top_p,
        image_tokens_only: bool = SAMPLING.image_tokens_only,
        draft_window: int | str = AUTO,
        progress: bool = False,
        callback: ProgressCallback | None = None,
        on_image: ImageCallback | None = None,
    ) -> Result:
        """Draw n images of every prompt, all n of the first prompt first.

        Image i of a prompt uses seed + i for its tokens and its noise. It does not depend on the others of
        the call.

        Args:
            prompt: What to draw; several prompts as a list.
            n: Images per prompt.
            seed: Of tokens and noise.
            temperature: Divides the logits.
            top_k: How many tokens sampling keeps; None is the published number, 0 is all, 1 is greedy.
            top_p: Probability mass that sampling keeps.
            image_tokens_only: Whether only image tokens can be sampled.
            draft_window: Rows of an image in a pass of the decoder, 1 to 16; 1 draws one token a pass.
                "auto" chooses what is quickest. The image is the same bit for bit.
            steps: Denoising steps.
            guidance: Scale of classifier-free guidance.
            progress: Whether to draw progress bars.
            callback: Told of every token and step; returning False raises Cancelled.
            on_image: Given each image with its index as soon as it is drawn.

        Raises:
            PromptError: A prompt is empty or too long; raised before any work.
            ParameterError: Another argument is wrong; raised before any work.
            Cancelled: The callback returned False.
            GenerationError: An image failed. The others are drawn first and are in its `images`.
        """
        sampling = SamplingParams(
            seed=seed, temperature=temperature, top_k=top_k, top_p=top_p, image_tokens_only=image_tokens_only
        )
        params, prompts = DiffusionParams(steps=steps, guidance=guidance), prompt_list(prompt)
        return self._images(prompts, None, n, sampling, draft_window, params, progress, callback, on_image)

    def edit(
        self,
        prompt: str,
        reference: References,
        *,
        n: int = 1,
        seed: int = SAMPLING.seed,
        steps: int = DIFFUSION.steps,
        guidance: float = DIFFUSION.guidance,
        temperature: float = SAMPLING.temperature,
        top_k: int | None = SAMPLING.top_k,
        top_p: float = SAMPLING.top_p,
        image_tokens_only: bool = SAMPLING.image_tokens_only,
        draft_window: int | str = AUTO,
        progress: bool = False,
        callback: ProgressCallback | None = None,
        on_image: ImageCallback | None = None,
    ) -> Result:
        """Draw n images of what the prompt makes of the reference image (or images); otherwise as `generate`.

        Raises:
            ImageError: The reference image cannot be used. Otherwise what `generate` raises.
        """
        sampling = SamplingParams(
            seed=seed, temperature=temperature, top_k=top_k, top_p=top_p, image_tokens_only=image_tokens_only
        )
        params, references = DiffusionParams(steps=steps, guidance=guidance), reference_list(reference)
        return self._images(
            [prompt], references, n, sampling, draft_window, params, progress, callback, on_image
        )

    def generate_each(
        self,
        requests: Sequence[ImageRequest],
        *,
        steps: int = DIFFUSION.steps,
        guidance: float = DIFFUSION.guidance,
        temperature: float = SAMPLING.temperature,
        top_k: int | None = SAMPLING.top_k,
        top_p: float = SAMPLING.top_p,
        image_tokens_only: bool = SAMPLING.image_tokens_only,
        on_result: Callable[[int, Image.Image | Blip3oError], None] | None = None,
    ) -> list[Image.Image | Blip3oError]:
        """Draw an image of every request, whose prompts, seeds and references are its own.

        An image is the one of `generate` or `edit`. What cannot be drawn costs only itself: its error stands
        in its place.

        Args:
            requests: What to draw.
            steps: Denoising steps.
            guidance: Scale of classifier-free guidance.
            temperature: Divides the logits.
            top_k: How many tokens sampling keeps; None is the published number, 0 is all, 1 is greedy.
            top_p: Probability mass that sampling keeps.
            image_tokens_only: Whether only image tokens can be sampled.
            on_result: Given each image or error with its index as soon as it is there.

        Raises:
            ParameterError: An argument that is common to all is wrong; raised before any work.
        """
        sampling = SamplingParams(
            temperature=temperature, top_k=top_k, top_p=top_p, image_tokens_only=image_tokens_only
        )
        params = DiffusionParams(steps=steps, guidance=guidance)
        self._planner.check([], sampling)
        check_callback("on_result", on_result, "index", "image")
        if not isinstance(requests, list | tuple) or not all(isinstance(r, ImageRequest) for r in requests):
            raise ParameterError(f"requests is {shown(requests)}: accepted is a list of ImageRequest")
        found: dict[int, Image.Image | Blip3oError] = {}
        with self._run(on_image=on_result) as run:

            def done(index: int, result: Image.Image | Blip3oError) -> None:
                found[index] = result
                run.drawn(index, result)

            planned: dict[int, PlanRequest] = {}
            for index, request in enumerate(requests):
                try:
                    planned[index] = self._plan_request(request, sampling, run)
                except Blip3oError as error:
                    done(index, error)
            plans = self._planner.plans([*planned.values()], run)
            for index, result in zip(planned, self._drawn(plans, params, run), strict=True):
                done(index, result)
        return [found[index] for index in range(len(requests))]

    def _plan_request(self, request: ImageRequest, sampling: SamplingParams, run: Run) -> PlanRequest:
        """A request with its reference encoded. Raises Blip3oError for what cannot be drawn."""
        sampling = dataclasses.replace(sampling, seed=request.seed)
        self._planner.check([request.prompt], sampling)
        references = None if request.reference is None else reference_list(request.reference)
        (found,) = self._planner.requests(request.prompt, [sampling], self._reference(references, run))
        return found

    def rollout(
        self,
        prompts: str | Sequence[str],
        n: int = 1,
        seed: int = SAMPLING.seed,
        *,
        references: Sequence[References | None] | None = None,
        steps: int = DIFFUSION.steps,
        guidance: float = DIFFUSION.guidance,
        temperature: float = SAMPLING.temperature,
        top_k: int | None = SAMPLING.top_k,
        top_p: float = SAMPLING.top_p,
        image_tokens_only: bool = SAMPLING.image_tokens_only,
        images: bool = True,
        hidden_states: bool = False,
        progress: bool = False,
        callback: ProgressCallback | None = None,
    ) -> Rollouts:
        """Draw n samples of every prompt with the log-probabilities of their tokens, for a trainer.

        Sample i of a prompt uses seed + i for its tokens and its noise: its image is the one of `generate` or
        `edit` with that seed. Samples of one prompt share its prefix in the key/value cache.

        Args:
            prompts: What to draw, or what to change; several as a list of any length.
            n: Samples per prompt.
            seed: Of the first sample of every prompt.
            references: The reference image (or images) of each prompt's edit, None for text-to-image.
            steps: Denoising steps.
            guidance: Scale of classifier-free guidance.
            temperature: Divides the logits.
            top_k: How many tokens sampling keeps; None is the published number, 0 is all, 1 is greedy.
            top_p: Probability mass that sampling keeps.
            image_tokens_only: Whether only image tokens can be sampled.
            images: Whether to draw the images too.
            hidden_states: Whether to return the decoder's hidden states.
            progress: Whether to draw progress bars.
            callback: Told of every token and of every step, which images may share; False raises Cancelled.

        Returns:
            A flat list, all samples of the first prompt first.

        Raises:
            PromptError: A prompt is empty or too long; raised before any work.
            ImageError: A reference image cannot be used.
            ParameterError: Another argument is wrong; raised before any work.
            Cancelled: The callback returned False.
            GenerationError: A sample's numbers are not finite.
        """
        check_flag("images", images)
        check_flag("hidden_states", hidden_states)
        sampling = SamplingParams(
            seed=seed, temperature=temperature, top_k=top_k, top_p=top_p, image_tokens_only=image_tokens_only
        )
        params = DiffusionParams(steps=steps, guidance=guidance)
        samples = [dataclasses.replace(sampling, seed=seed) for seed in image_seeds(sampling.seed, n)]
        texts = prompt_list(prompts)
        given = references_of(references, len(texts))
        self._planner.check(texts, sampling)
        rollouts: list[Rollout] = []
        with self._run(progress, callback) as run:
            requests = self._plan_requests(texts, given, samples, None, run)
            window = BATCHES * self.max_batch
            for first in range(0, len(requests), window):
                plans = self._planner.plans(requests[first : first + window], run)
                rollouts += self._rollouts(plans, params if images else None, hidden_states, run)
            report = run.report(dtype=self.precision, tier=self.tier, switches=self.switches)
        return Rollouts(rollouts, report)

    def _rollouts(
        self, plans: list[Plan], params: DiffusionParams | None, hidden_states: bool, run: Run
    ) -> Iterator[Rollout]:
        if error := next((plan.error for plan in plans if plan.error is not None), None):
            raise error
        images: list[Tensor | None] = [None] * len(plans)
        if params is not None:
            noises = [self._renderer.noise(plan.sampling.seed) for plan in plans]
            with trace.span("render"):
                images = [*map(eight_bit, self._renderer.pixels(plans, params, noises, run))]
        for plan, image in zip(plans, images, strict=True):
            raw, processed = (found.cpu() for found in self._planner.log_probs(plan))
            hidden = plan.hidden_states[0].cpu() if hidden_states else None
            seed, ids, tokens = plan.sampling.seed, plan.prompt_ids[0], plan.token_ids[0]
            version = self._weights.version
            yield Rollout(plan.prompt, seed, ids, tokens, raw, processed, image, hidden, version)

    def _images(
        self,
        prompts: list[str],
        references: list[ReferenceImage] | None,
        n: int,
        sampling: SamplingParams,
        draft_window: int | str,
        params: DiffusionParams,
        progress: bool,
        callback: ProgressCallback | None,
        on_image: ImageCallback | None,
    ) -> Result:
        samples = [dataclasses.replace(sampling, seed=seed) for seed in image_seeds(sampling.seed, n)]
        window = check_draft_window(draft_window)
        self._planner.check(prompts, sampling)
        with self._run(progress, callback, on_image) as run:
            requests = self._plan_requests(prompts, [references] * len(prompts), samples, window, run)
            plans = self._planner.plans(requests, run)
            drawn: list[Image.Image | GenerationError] = []
            for index, result in enumerate(self._drawn(plans, params, run)):
                drawn.append(result)
                if isinstance(result, Image.Image):
                    run.drawn(index, result)
            report = run.report(dtype=self.precision, tier=self.tier, switches=self.switches)
        images = [result if isinstance(result, Image.Image) else None for result in drawn]
        if errors := [result for result in drawn if isinstance(result, GenerationError)]:
            raise GenerationError(f"{len(errors)} of {len(plans)} images failed: {errors[0]}", images=images)
        return Result([image for image in images if image is not None], plans, report)

    def _plan_requests(
        self,
        prompts: Sequence[str],
        references: Sequence[Sequence[ReferenceImage] | None],
        samples: Sequence[SamplingParams],
        draft_window: int | None,
        run: Run,
    ) -> list[PlanRequest]:
        """An image of every sample of each prompt, which has a reference of its own."""
        requests: list[PlanRequest] = []
        for index, (prompt, images) in enumerate(zip(prompts, references, strict=True)):
            reference = self._reference(images, run)
            with which_prompt(index, len(prompts)):
                requests += self._planner.requests(prompt, samples, reference, draft_window)
        return requests

    def _drawn(
        self, plans: Sequence[Plan], params: DiffusionParams, run: Run
    ) -> Iterator[Image.Image | GenerationError]:
        """The image of each plan, or its error."""
        for plan in plans:
            result: Image.Image | GenerationError
            try:
                with trace.span("render"):
                    result = plan.error or self._renderer.image(plan, params, plan.sampling.seed, run)
            except GenerationError as error:
                result = error
            yield result

    def _reference(self, references: Sequence[ReferenceImage] | None, run: Run) -> Reference:
        """Encode the reference images of an edit in the ways that the checkpoint was trained with."""
        if references is None:
            return NO_REFERENCE
        with trace.span("reference"):
            images = [load_reference(image) for image in references]
            self._planner.require_editing()
            with run.stage("reference", len(images)):
                latents = self._renderer.reference_latents(images)
                return dataclasses.replace(self._planner.reference(images), latents=latents)

    @contextmanager
    def _run(
        self,
        progress: bool = False,
        callback: ProgressCallback | None = None,
        on_image: ImageCallback | None = None,
    ) -> Iterator[Run]:
        """A request, in its turn. Raises ParameterError for callbacks that cannot be called."""
        check_flag("progress", progress)
        check_callback("callback", callback, "progress")
        check_callback("on_image", on_image, "index", "image")
        with (
            self._isolation.turn() as settings,
            ops.recording_usage() as used,
            self._runner.noting_eager() as not_captured,
        ):
            self._requests += 1
            try:
                yield Run(self.device, used, not_captured, settings, callback, on_image, show=progress)
            finally:
                self._requests -= 1
