"""The runtime's stages as calls that can be timed: the code that a request runs, on seeded inputs.

On a GPU they are captured as graphs first, as a pipeline does before it is ready.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from blip3o_rt.ar.engine import Request, TokenEngine, TokenPrompt
from blip3o_rt.ar.kv_cache import DEFAULT_PAGE_SIZE, Sequence
from blip3o_rt.ar.prompt import PromptEncoder
from blip3o_rt.checkpoint.load import Checkpoint
from blip3o_rt.connector.model import Connector
from blip3o_rt.dit.captured import CapturedImages, Geometry
from blip3o_rt.dit.conditioning import Condition, ConditionTokens, condition_tokens
from blip3o_rt.dit.denoise import Denoising
from blip3o_rt.dit.model import DiT, ScheduleTables
from blip3o_rt.dit.schedule import flow_schedule
from blip3o_rt.dit.shortcuts import Shortcuts
from blip3o_rt.dit.step import EagerSteps, StepKind, StepState, guided_step
from blip3o_rt.errors import ConfigError
from blip3o_rt.graphs import GraphRunner
from blip3o_rt.measure.bench import work
from blip3o_rt.measure.bench.timing import nothing
from blip3o_rt.measure.bench.work import Work
from blip3o_rt.params import SamplingParams
from blip3o_rt.pipeline import Pipeline
from blip3o_rt.switches import DIT_WEIGHTS, VAE_TILES, setting
from blip3o_rt.tatok.model import ImageTokenizer
from blip3o_rt.vae.model import Autoencoder

PROMPT = "a red circle on a blue background"
STEPS = 30
GUIDANCE = 2.0
SEED = 0


def seeded(*shape: int, device: torch.device, low: float | None = None) -> Tensor:
    """float32 numbers that are the same in every run: normal ones, or even ones from `low` to -`low`."""
    generator = torch.Generator().manual_seed(SEED)
    if low is None:
        return torch.randn(*shape, generator=generator).to(device)
    return (low - 2 * low * torch.rand(*shape, generator=generator)).to(device)


class ArStage:
    """The autoregressive stage: prompts, and tokens from half-way into an image.

    Half-way, a token attends to as many positions as it does on average over an image.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        max_batch: int,
        sampling: SamplingParams | None = None,
        page_size: int = DEFAULT_PAGE_SIZE,
    ) -> None:
        self.config, self.weights = checkpoint.config, checkpoint.weights["ar"]
        self.sampling = sampling or SamplingParams(seed=SEED)
        tokens = self.config.image_tokens
        self.prompt_ids = self.prompt(checkpoint)
        drawn, codes = tokens.tokens_per_image // 2, tokens.image_token_range
        self.context = [*self.prompt_ids, *(codes[i % len(codes)] for i in range(drawn))]
        self.engine = TokenEngine(
            self.config.ar,
            replace(tokens, tokens_per_image=tokens.tokens_per_image - drawn),
            self.weights,
            max_batch=max_batch,
            max_prompt_tokens=len(self.context),
            page_size=page_size,
        )
        self.engine.capture()
        self._steps = TokenSteps(self.engine, self.context, self.sampling, 1)

    @staticmethod
    def prompt(checkpoint: Checkpoint) -> list[int]:
        """The ids of the prompt that is timed, as the checkpoint's tokenizer makes them."""
        tokens = checkpoint.config.image_tokens
        longest = checkpoint.config.ar.max_position_embeddings - tokens.tokens_per_image
        return PromptEncoder(checkpoint.tokenizer_dir, tokens, longest).encode(PROMPT)[0]

    @property
    def steps_per_run(self) -> int:
        """Tokens from the context to the end of the image."""
        return self.engine.image_tokens.tokens_per_image

    def prefill(self) -> Tensor:
        """The prompt's hidden states [P, hidden]."""
        decoder, cache, sequence = self.engine.decoder, self.engine.cache, Sequence()
        cache.reserve(sequence, len(self.prompt_ids))
        try:
            return decoder.prefill(
                decoder.embed(torch.tensor(self.prompt_ids, device=decoder.device)), sequence
            )
        finally:
            cache.release(sequence)

    @property
    def itemsize(self) -> int:
        """Bytes of an activation, and of a weight of the baselines."""
        return self.engine.decoder.dtype.itemsize

    @property
    def weight_itemsize(self) -> int:
        """Bytes of an element of our matrices, which may be quantized."""
        return self.engine.decoder.head.weight.itemsize

    def prefill_work(self, length: int | None = None, weight_itemsize: int | None = None) -> Work:
        """Of the prompt, or of another number of tokens in one pass; ours takes our weight_itemsize."""
        length = length or len(self.prompt_ids)
        return work.ar_prefill(self.config.ar, weight_itemsize or self.itemsize, length=length)

    def tokens(self, batch: int, queued: int = 1) -> TokenSteps:
        """The token loop of `batch` images, a token of each at a call; ends the loop before it.

        Args:
            queued: calls between two preparations.
        """
        self._steps.close()
        self._steps = TokenSteps(self.engine, self.context, self.sampling, batch, queued)
        return self._steps

    def head_rows(self) -> range:
        """Rows of the head that the tokens are drawn from."""
        whole = range(self.config.ar.vocab_size)
        return self.config.image_tokens.image_token_range if self.sampling.image_tokens_only else whole

    def token_work(self, batch: int, head_rows: int, weight_itemsize: int | None = None) -> Work:
        """Of a token at the context, the shortest that is timed; ours takes our weight_itemsize."""
        return work.ar_token(
            self.config.ar,
            self.itemsize,
            batch=batch,
            context=len(self.context),
            head_rows=head_rows,
            weight_itemsize=weight_itemsize,
        )


class TokenSteps:
    """The engine's token loop taken one token at a time, begun anew when the images are finished."""

    def __init__(
        self, engine: TokenEngine, context: list[int], sampling: SamplingParams, batch: int, queued: int = 1
    ) -> None:
        self._engine, self._queued = engine, queued
        seeds = range(sampling.seed, sampling.seed + batch)
        self._prompts = [TokenPrompt(context, replace(sampling, seed=seed)) for seed in seeds]
        self._requests: list[Request] = []
        self._left = 0  # tokens to draw until the images are finished

    def prepare(self) -> None:
        """Read the context again where too few tokens are left; the first token after it is drawn here."""
        if self._left < self._queued:
            self.close()
            self._requests = [self._engine.submit(prompt) for prompt in self._prompts]
            self._left = self._engine.image_tokens.tokens_per_image
            self()

    def __call__(self) -> Tensor:
        """Vocabulary ids int64 [batch]."""
        self._left -= 1
        return self._engine.step()

    def close(self) -> None:
        """Return the pages of the cache."""
        for request in self._requests:
            self._engine.cancel(request)
        self._requests = []


class ConnectorStage:
    """The connector between decoder and diffusion transformer, on all hidden states of an image."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.config, self.weights = checkpoint.config, checkpoint.weights["connector"]
        self.connector = Connector(self.weights, "diffusion_connector")
        shape = self.config.image_tokens.tokens_per_image + 1, self.config.ar.hidden_size
        self.hidden = seeded(*shape, device=checkpoint.device).to(checkpoint.dtype)
        work = partial(condition_tokens, self.hidden, self.connector)
        self._run = GraphRunner.of(checkpoint.device).capture("connector", work)

    def run(self) -> ConditionTokens:
        """Both branches' tokens; the unconditional branch's are all the same, so one is computed."""
        return self._run()

    def work(self) -> Work:
        return work.connector(self.config, self.connector.weight_in.itemsize, tokens=len(self.hidden) + 1)

    def published_work(self) -> Work:
        return work.connector(self.config, self.connector.weight_in.itemsize, tokens=2 * len(self.hidden))


class DitStage:
    """The diffusion transformer: what is computed once per schedule, once per image, and at every step.

    edit: of an edit, whose condition has the cells of a reference latent and which sees it beside the noise,
    each where the checkpoint was trained so.
    """

    def __init__(self, checkpoint: Checkpoint, steps: int = STEPS, *, edit: bool = False) -> None:
        self.config, self.weights, self.edit = checkpoint.config, checkpoint.weights["dit"], edit
        channels, side = self.config.vae.latent_channels, self.config.dit.sample_size
        channelwise = self.config.dit.in_channels != channels
        beside = channelwise or self.config.edit.use_und_image_vae_as_noise
        if edit and not (beside or self.config.edit.use_und_image_vae):
            raise ConfigError("the steps of this checkpoint's edits are those of text-to-image")
        if channelwise and not edit:
            raise ConfigError(
                "a step of text-to-image needs a transformer that takes the latent alone, not one for "
                "edits only"
            )
        self.dit = DiT(self.config.dit, self.weights)
        self.itemsize = checkpoint.precision.weights.itemsize
        self.quantized = DIT_WEIGHTS in checkpoint.switches
        self.schedule = flow_schedule(self.config.scheduler, steps)
        self.noise, reference = seeded(2, channels, side, side, device=self.dit.device).split(1)
        self.reference = reference if edit and beside else None
        counts = work.step_shape(self.config, edit=edit).counts
        captions = seeded(sum(counts) + len(counts), self.config.dit.caption_channels, device=self.dit.device)
        null, conditional = captions.to(self.dit.dtype).tensor_split([len(counts)])
        self.tokens = ConditionTokens(conditional, null, counts)
        self.kind: StepKind = guided_step
        self.shortcuts = Shortcuts.of(checkpoint.switches)
        self.kinds = self.shortcuts.steps(self.schedule)
        self.state: StepState | None = None
        self._step: Callable[[], None] = nothing
        self._runner = GraphRunner.of(self.dit.device)
        self._captured: CapturedImages | None = None

    def every_token(self) -> None:
        """Take each unconditional token as if no other were identical to it: the same condition."""
        tokens = self.tokens
        counts = torch.tensor(tokens.null_counts, device=tokens.null.device)
        every = tokens.null.repeat_interleave(counts, dim=0, output_size=sum(tokens.null_counts))
        self.tokens = replace(tokens, null=every, null_counts=(1,) * len(every))

    def tables(self) -> ScheduleTables:
        return self.dit.schedule_tables(self.schedule)

    def capture_image(self) -> None:
        """Capture the condition and every kind of step as a pipeline does, where there are graphs."""
        if self._captured is None and self._runner.captures:
            tokens = self.tokens
            geometry = Geometry.of(self.noise, tokens.conditional, self.reference, None)
            given = geometry, lambda *_: tokens, self.dit.dtype, self._runner, self.shortcuts.kinds
            self._captured = CapturedImages(self.dit, *given)

    def condition(self) -> Condition:
        if self._captured is None:
            return self.dit.condition(self.tokens)
        return self._captured.images[0].condition(self.tokens.conditional)

    def prepare(self, index: int = 0) -> None:
        """What the step of that index takes as given, and the noise in the place of the latent."""
        if self.state is None:
            given = self.tables(), self.dit.condition(self.tokens), GUIDANCE, self.reference
            self.state = StepState.begin(self.dit, self.noise, *given)
            self._step = self._runner.capture("dit.step", partial(self.kind, self.dit, [self.state]))
        self.state.latent.copy_(self.noise)
        self.state.index.fill_(index)

    def step(self) -> Tensor:
        """The latent after the step that was prepared, in place."""
        self._step()
        assert self.state is not None
        return self.state.latent

    def prepare_denoise(self) -> None:
        """What all steps of the schedule take as given."""
        self.prepare()
        self.capture_image()

    def denoise(self) -> Tensor:
        """The latent after all steps of the schedule, as the checkpoint's switches make them."""
        assert self.state is not None
        tables, given = self.state.tables, (GUIDANCE, self.reference)
        if self._captured is None:
            state = StepState.begin(self.dit, self.noise, tables, self.state.condition, *given)
            return Denoising(EagerSteps(self.dit), state, tables, self.kinds).run()
        image = self._captured.images[0]
        image.begin(self.noise, tables, *given)
        return Denoising(self._captured, image.state, tables, self.kinds).run()

    def tables_work(self) -> Work:
        return work.dit_tables(self.config.dit, self.itemsize, steps=self.schedule.steps)

    def condition_work(self) -> Work:
        count = len(self.tokens.conditional) + 1
        return work.dit_condition(self.config.dit, self.itemsize, tokens=count)

    def step_work(self, *, shortened: bool) -> Work | None:
        """shortened: ours. None where its products are of 8 bits: nothing measures their roofline."""
        if shortened and self.quantized:
            return None
        return work.dit_step(self.config, self.itemsize, shortened=shortened, edit=self.edit)


class VaeStage:
    """The autoencoder, on a latent and on an image."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.config, self.weights = checkpoint.config, checkpoint.weights["vae"]
        tiles = setting(checkpoint.switches, VAE_TILES) or 1
        self.autoencoder = Autoencoder(self.config.vae, self.weights, tiles=tiles)
        size, vae, device = self.config.image_size, self.config.vae, self.autoencoder.device
        side = size // vae.compression
        self.latent = seeded(1, vae.latent_channels, side, side, device=device)
        self.pixels = seeded(1, vae.image_channels, size, size, device=device, low=-1.0)
        if device.type == "cuda":
            self.autoencoder.capture_decode(side, side)
            self.autoencoder.capture_encode(size, size)

    def decode(self) -> Tensor:
        return self.autoencoder.decode(self.latent)

    def encode(self) -> Tensor:
        return self.autoencoder.encode(self.pixels)

    def decode_work(self, *, shortened: bool) -> Work:
        return work.vae_decode(self.config, self.autoencoder.dtype.itemsize, shortened=shortened)

    def encode_work(self) -> Work:
        return work.vae_encode(self.config, self.autoencoder.dtype.itemsize)


class TatokStage:
    """The image tokenizer, on an image."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        tower = checkpoint.config.ta_tok
        if tower is None:
            raise ConfigError("this checkpoint has no image tokenizer")
        self.config, self.tower, self.weights = checkpoint.config, tower, checkpoint.weights["ta_tok"]
        self.tokenizer = ImageTokenizer(tower, self.weights)
        size, channels = tower.image_size, tower.image_channels
        self.pixels = seeded(1, channels, size, size, device=self.tokenizer.device, low=-1.0)
        if self.tokenizer.device.type == "cuda":
            self.tokenizer.capture()

    def encode(self) -> tuple[Tensor, Tensor]:
        return self.tokenizer.encode(self.pixels)

    def work(self) -> Work:
        return work.tatok_encode(self.config, self.tokenizer.task[0].itemsize)


class ImageStage:
    """Whole images through the pipeline, and the time that none of its stages accounts for."""

    def __init__(self, checkpoint: Checkpoint, *, max_batch: int, steps: int = STEPS) -> None:
        self.pipeline = Pipeline(checkpoint, max_batch=max_batch)
        self.pipeline.warm_up()
        self.steps = steps
        self.host: dict[int, list[float]] = {}

    def draw(self, batch: int) -> list[object]:
        """`batch` images of one prompt."""
        begin = time.perf_counter()
        result = self.pipeline.generate(PROMPT, n=batch, seed=SEED, steps=self.steps, guidance=GUIDANCE)
        whole = time.perf_counter() - begin
        self.host.setdefault(batch, []).append(whole - result.report.total_seconds)
        return list(result)
