"""Other people's ways of doing a stage's work, on the same weights and the same inputs.

transformers, diffusers: their modules as they are, eager. published: the published way, which draws over the
whole vocabulary, reads the whole sequence a second time and runs the connector inside the denoising loop.
compiled, graphed: the same under torch.compile with a static cache, without and with CUDA graphs. fp32: this
runtime, with weights and arithmetic in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from blip3o_rt.checkpoint.load import Checkpoint
from blip3o_rt.errors import ParameterError
from blip3o_rt.measure.bench import baseline_modules
from blip3o_rt.measure.bench.stages import (
    GUIDANCE,
    SEED,
    STEPS,
    ArStage,
    ConnectorStage,
    DitStage,
    TatokStage,
    VaeStage,
)
from blip3o_rt.measure.records import describe
from blip3o_rt.params import SamplingParams

FLOAT32 = "fp32"
BASELINES = ("transformers", "diffusers", "published", "compiled", "graphed", FLOAT32)
DEFAULT_BASELINES = ("transformers", "diffusers", "published")
WHO = {"compiled": "published-compiled", "graphed": "published-graphed"}  # others are called as they are
COMPILE_MODES = {"compiled": "default", "graphed": "reduce-overhead"}
PACKAGE = {"transformers": "transformers"}  # diffusers for every other


def available(names: tuple[str, ...], device: torch.device) -> tuple[tuple[str, ...], list[str]]:
    """The baselines of these that can run here, and a line for each reason why others cannot."""
    reasons = {name: unavailable(name, device) for name in names}
    left_out: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        if reason is not None:
            left_out.setdefault(reason, []).append(name)
    notes = [f"{', '.join(together)} left out: {reason}" for reason, together in left_out.items()]
    return tuple(name for name, reason in reasons.items() if reason is None), notes


def unavailable(name: str, device: torch.device) -> str | None:
    """None where a baseline can run on the device, else why not. Raises ParameterError for another name."""
    if name not in BASELINES:
        raise ParameterError(f"baselines has {name!r}: accepted are {', '.join(BASELINES)} and none")
    if name == "graphed" and device.type != "cuda":
        return "CUDA graphs need a GPU"
    if name == FLOAT32:
        return None
    reason = baseline_modules.missing_package(PACKAGE.get(name, "diffusers"))
    if reason is None and name in COMPILE_MODES:
        reason = compile_problem(device)
    return reason


@functools.cache
def compile_problem(device: torch.device) -> str | None:
    """None where torch.compile works on this machine, else why not."""
    try:
        torch.compile(lambda x: (x + 1).relu())(torch.ones(16, device=device))
    except Exception as error:  # no compiler, an unsupported Python, a broken Triton: all end here
        return f"torch.compile does not work here ({describe(error)})"
    return None


class LanguageBaseline:
    """transformers' Qwen3 over an ArStage's weights, prompt and context."""

    def __init__(self, stage: ArStage) -> None:
        self.stage = stage
        self.model = baseline_modules.language_model(stage.config.ar, stage.weights)
        self.device = stage.engine.decoder.device

    def ids(self, values: list[int], batch: int = 1) -> Tensor:
        """int64 [batch, len(values)], the same in every row."""
        return torch.tensor([values], device=self.device).expand(batch, -1)

    def prefill(self) -> Tensor:
        """The prompt's hidden states [P, hidden], with the cache that decoding would go on from."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        ids = self.ids(self.stage.prompt_ids)
        return self.model.model(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state[0]

    def second_pass(self) -> Tensor:
        """Hidden states [T + 1, hidden] of a finished image, from one pass over prompt and tokens."""
        tokens = self.stage.config.image_tokens
        codes = tokens.image_token_range
        drawn = [codes[i % len(codes)] for i in range(tokens.tokens_per_image)]
        ids = self.ids([*self.stage.prompt_ids, *drawn])
        states = self.model.model(input_ids=ids, use_cache=False).last_hidden_state
        return states[0, -(len(drawn) + 1) :]

    def tokens(
        self, batch: int, *, whole_vocabulary: bool = False, compile_mode: str | None = None
    ) -> LanguageTokens:
        return LanguageTokens(self, batch, whole_vocabulary, compile_mode)


class LanguageTokens:
    """Decoding with transformers, one token a call: draw from the last logits, then one forward step.

    Eagerly with a growing cache, compiled with a static one. Over the whole vocabulary as the published code
    draws, or over the rows of the head that the runtime reads.
    """

    def __init__(
        self, baseline: LanguageBaseline, batch: int, whole_vocabulary: bool, compile_mode: str | None
    ) -> None:
        self._baseline, self._batch, self._static = baseline, batch, compile_mode is not None
        stage, config = baseline.stage, baseline.stage.config
        rows = range(config.ar.vocab_size) if whole_vocabulary else stage.head_rows()
        self._first_row, self._head = rows.start, baseline.model.lm_head.weight[rows.start : rows.stop]
        sampling, sizes = stage.sampling, (config.image_tokens.num_image_tokens, config.ar.vocab_size)
        self._draw = Sampler(sampling.temperature, sampling.top_k_for(*sizes), sampling.top_p)
        decoder = baseline.model.model
        self._step = decoder if compile_mode is None else torch.compile(decoder, mode=compile_mode)
        self._left, self._cache, self._hidden = 0, self._empty_cache(), torch.empty(0)

    def _empty_cache(self) -> Any:
        from transformers import DynamicCache, StaticCache

        stage, config = self._baseline.stage, self._baseline.model.config
        if self._static:
            return StaticCache(config=config, max_cache_len=len(stage.context) + stage.steps_per_run)
        return DynamicCache(config=config)

    def prepare(self) -> None:
        """Read the context again where no token is left to draw; the first token after it is drawn here."""
        if self._left > 0:
            return
        if self._static:
            self._cache.reset()  # the compiled step knows these tensors by their addresses
        else:
            self._cache = self._empty_cache()
        ids = self._baseline.ids(self._baseline.stage.context, self._batch)
        output = self._baseline.model.model(input_ids=ids, past_key_values=self._cache, use_cache=True)
        self._hidden = output.last_hidden_state[:, -1]
        self._left = self._baseline.stage.steps_per_run
        self()

    def __call__(self) -> Tensor:
        """Vocabulary ids int64 [batch]."""
        tokens = self._draw(F.linear(self._hidden, self._head).float()) + self._first_row
        output = self._step(input_ids=tokens[:, None], past_key_values=self._cache, use_cache=True)
        self._hidden = output.last_hidden_state[:, -1].clone()  # a graph writes its next result over it
        self._left -= 1
        return tokens


class Sampler:
    """Temperature, top-k and top-p as transformers' generate() applies them, and a draw."""

    def __init__(self, temperature: float, top_k: int, top_p: float) -> None:
        from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        self._warpers: list[Any] = [TemperatureLogitsWarper(temperature)] if temperature != 1 else []
        self._warpers += [TopKLogitsWarper(top_k)] if top_k else []
        self._warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []

    def __call__(self, logits: Tensor) -> Tensor:
        """int64 [batch] of logits [batch, rows]."""
        for warper in self._warpers:
            logits = warper(None, logits)
        return torch.multinomial(logits.softmax(dim=-1), num_samples=1)[:, 0]


class ConnectorBaseline:
    """The connector as the published code calls it: on zeros and hidden states, at every step."""

    def __init__(self, stage: ConnectorStage) -> None:
        self.module = baseline_modules.diffusion_connector(stage.config, stage.weights)
        self.hidden = torch.stack([torch.zeros_like(stage.hidden), stage.hidden])

    def run(self) -> Tensor:
        """[2, T + 1, width], unconditional branch first."""
        return self.module(self.hidden)


class DitBaseline:
    """diffusers' transformer and scheduler over a DitStage's weights and inputs."""

    def __init__(self, stage: DitStage, compile_mode: str | None = None) -> None:
        self.stage = stage
        module = baseline_modules.transformer(stage.config.dit, stage.weights)
        self.module = module if compile_mode is None else torch.compile(module, mode=compile_mode)
        self.scheduler = flow_scheduler(stage.config, stage.schedule.steps, stage.dit.device)
        counts = torch.tensor(stage.tokens.null_counts, device=stage.dit.device)
        null = stage.tokens.null.repeat_interleave(counts, dim=0, output_size=len(stage.tokens.conditional))
        self.condition = torch.stack([null, stage.tokens.conditional])

    def step(self, index: int = 0) -> Tensor:
        """The latent after one step from the given latent."""
        self.scheduler._step_index = index
        stage = self.stage
        return published_step(
            self.module, self.scheduler, stage.noise, self.condition, index, stage.reference
        )


def flow_scheduler(config: Any, steps: int, device: torch.device) -> Any:
    """diffusers' scheduler set to the published sigmas."""
    scheduler = baseline_modules.scheduler(config.scheduler)
    scheduler.set_timesteps(steps, sigmas=np.linspace(1.0, 1.0 / steps, steps), device=device)
    return scheduler


def published_step(
    transformer: Any,
    scheduler: Any,
    latent: Tensor,
    condition: Tensor,
    index: int,
    reference: Tensor | None = None,
) -> Tensor:
    """Both halves through the transformer, guidance, and one Euler step; latents [B, C, h, w] float32.

    reference [B, C, h, w]: the latent that an edit sees beside the noisy one.
    """
    timestep = scheduler.timesteps[index]
    _, channels, _, width = latent.shape
    beside = 3 if transformer.config.in_channels == channels else 1  # as columns, or as further channels
    seen = latent if reference is None else torch.cat([latent, reference], dim=beside)
    both = torch.cat([seen, seen]).to(condition.dtype)
    prediction = transformer(
        both, encoder_hidden_states=condition, timestep=timestep.expand(len(both))
    ).sample[:, :channels, :, :width]
    null, conditional = prediction.float().chunk(2)
    return scheduler.step(null + GUIDANCE * (conditional - null), timestep, latent).prev_sample


class VaeBaseline:
    """diffusers' autoencoder over a VaeStage's weights and inputs."""

    def __init__(self, stage: VaeStage, compile_mode: str | None = None) -> None:
        self.stage, self.dtype = stage, stage.autoencoder.dtype
        self.module = baseline_modules.autoencoder(stage.config.vae, stage.weights)
        self._decode = self.module.decode
        if compile_mode is not None:
            self._decode = torch.compile(self._decode, mode=compile_mode)

    def decode(self) -> Tensor:
        """Pixels [1, 3, H, W] in 0..1."""
        return published_decode(
            self._decode, self.stage.config.vae.scaling_factor, self.stage.latent, self.dtype
        )

    def encode(self) -> Tensor:
        """The latent [1, C, h, w], times the scaling factor."""
        return self.module.encode(self.stage.pixels.to(self.dtype)).latent * self.module.config.scaling_factor


def published_decode(
    decode: Callable[..., Any], scaling_factor: float, latent: Tensor, dtype: torch.dtype
) -> Tensor:
    return (decode((latent / scaling_factor).to(dtype)).sample / 2 + 0.5).clamp(0, 1)


class TatokBaseline:
    """transformers' vision tower over a TatokStage's weights and image."""

    def __init__(self, stage: TatokStage) -> None:
        self.stage = stage
        self.tower = baseline_modules.VisionTower(stage.tower, stage.weights)

    def encode(self) -> tuple[Tensor, Tensor]:
        return self.tower(self.stage.pixels)


class ImageBaseline:
    """Whole images the published way: generate, a second pass, the denoising loop, the decoder."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        prompt_ids: list[int],
        compile_mode: str | None = None,
        steps: int = STEPS,
    ) -> None:
        config, weights = checkpoint.config, checkpoint.weights
        self.config, self.steps, self.device = config, steps, checkpoint.device
        self.language = baseline_modules.language_model(config.ar, weights["ar"])
        self.connector = baseline_modules.diffusion_connector(config, weights["connector"])
        self.transformer = baseline_modules.transformer(config.dit, weights["dit"])
        self.decode = baseline_modules.autoencoder(config.vae, weights["vae"]).decode
        self.prompt = torch.tensor([prompt_ids], device=checkpoint.device)
        self.dtype = checkpoint.dtype
        self.generation: dict[str, Any] = {}
        if compile_mode is not None:
            self.language.model = torch.compile(self.language.model, mode=compile_mode, dynamic=False)
            self.transformer = torch.compile(self.transformer, mode=compile_mode)
            self.decode = torch.compile(self.decode, mode=compile_mode)
            self.generation = {"cache_implementation": "static"}

    def draw(self, batch: int) -> Tensor:
        """Pixels [batch, 3, H, W] in 0..1."""
        tokens, sampling = self.config.image_tokens, SamplingParams()
        count = tokens.tokens_per_image
        sequences = self.language.generate(
            self.prompt,
            attention_mask=torch.ones_like(self.prompt),
            num_return_sequences=batch,
            do_sample=True,
            temperature=sampling.temperature,
            top_k=sampling.top_k_for(tokens.num_image_tokens, self.config.ar.vocab_size),
            top_p=sampling.top_p,
            max_new_tokens=count,
            min_new_tokens=count,
            eos_token_id=None,
            pad_token_id=0,
            **self.generation,
        )
        states = self.language.model(input_ids=sequences, use_cache=False).last_hidden_state
        hidden = states[:, -(count + 1) :]
        side, channels = self.config.dit.sample_size, self.config.vae.latent_channels
        generator = torch.Generator().manual_seed(SEED)
        latent = torch.randn(batch, channels, side, side, generator=generator).to(self.device)
        scheduler = flow_scheduler(self.config, self.steps, self.device)
        for index in range(self.steps):
            condition = self.connector(torch.cat([torch.zeros_like(hidden), hidden]))
            latent = published_step(self.transformer, scheduler, latent, condition, index)
        return published_decode(self.decode, self.config.vae.scaling_factor, latent, self.dtype)
