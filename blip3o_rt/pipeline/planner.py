"""The first stage of an image: prompt and reference images -> `Plan`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from blip3o_rt import trace
from blip3o_rt.ar.engine import TokenEngine, TokenPlan, TokenPrompt
from blip3o_rt.ar.log_probs import token_log_probs
from blip3o_rt.ar.prompt import PromptEncoder
from blip3o_rt.checkpoint.load import Checkpoint
from blip3o_rt.connector.model import Connector
from blip3o_rt.errors import GenerationError, ImageError, ParameterError, PromptError, shown
from blip3o_rt.graphs import CapturedFunction, GraphRunner
from blip3o_rt.images import pixels_sha256, tower_pixels
from blip3o_rt.params import SamplingParams, check_dense, which_prompt
from blip3o_rt.result import Plan, Run
from blip3o_rt.switches import plan_switches
from blip3o_rt.tatok.model import ImageTokenizer


@dataclass(frozen=True)
class Reference:
    """What an edit takes from its reference images: vocabulary ids, TA-Tok features [n, hidden], latents."""

    token_ids: list[int]
    features: Tensor | None = None
    latents: tuple[Tensor, ...] = ()
    sha256: tuple[str, ...] = ()


NO_REFERENCE = Reference([])


@dataclass(frozen=True)
class PlanRequest:
    """One image: what the token engine takes for it, and what else goes into its plan."""

    prompt: str
    reference: Reference
    tokens: TokenPrompt


class Planner:
    """Prompt encoder, image tokenizer and token engine of a checkpoint."""

    def __init__(
        self, checkpoint: Checkpoint, runner: GraphRunner, *, max_batch: int, max_prompt_tokens: int
    ) -> None:
        config, weights = checkpoint.config, checkpoint.weights
        positions = config.ar.max_position_embeddings - config.image_tokens.tokens_per_image
        longest = min(max_prompt_tokens, positions)
        self.config = config
        self._switches = plan_switches(checkpoint.switches)
        self.max_prompt_tokens = longest
        self._prompts = PromptEncoder(checkpoint.tokenizer_dir, config.image_tokens, longest, positions)
        self.engine = TokenEngine(
            config.ar,
            config.image_tokens,
            weights["ar"],
            max_batch=max_batch,
            max_prompt_tokens=longest,
            runner=runner,
        )
        self._tokenizer = None
        if config.ta_tok is not None:
            self._tokenizer = ImageTokenizer(config.ta_tok, weights["ta_tok"], runner)
        self._feature_connector = None
        if config.edit.use_tar_siglip_features:
            connector = Connector(weights["connector"], "tar_siglip_features_connector")
            self._feature_connector = CapturedFunction("connector", connector, runner)

    @property
    def edits(self) -> bool:
        """Whether the checkpoint has an image tokenizer; without one it draws from text alone."""
        return self._tokenizer is not None

    def capture(self) -> None:
        """Capture the image tokenizer, the connector of its features and the token step."""
        if self._tokenizer is not None:
            self._tokenizer.capture()
            if self._feature_connector is not None:
                shape = (self._tokenizer.config.tokens, self._tokenizer.config.hidden_size)
                dtype, device = self._tokenizer.dtype, self._tokenizer.device
                self._feature_connector.capture(torch.empty(shape, dtype=dtype, device=device))
        self.engine.capture()

    def check(self, prompts: Sequence[str], sampling: SamplingParams) -> None:
        """Raise PromptError or ParameterError for what this checkpoint cannot plan."""
        for index, prompt in enumerate(prompts):
            with which_prompt(index, len(prompts)):
                self._prompts.check(prompt)
        sampling.top_k_for(self.config.image_tokens.num_image_tokens, self.config.ar.vocab_size)

    def count_tokens(self, prompt: str, references: int = 0) -> int:
        """Tokens of a prompt that `check` let pass with so many reference images. Raises PromptError."""
        tokens = self.require_editing().config.tokens * references if references else 0
        return len(self._prompts.encode(prompt, [self._prompts.image_pad_id] * tokens)[0])

    def require_editing(self) -> ImageTokenizer:
        """The image tokenizer. Raises ImageError where the checkpoint has none."""
        if self._tokenizer is None:
            raise ImageError(
                "this checkpoint has no image tokenizer and only draws from text: leave the image out"
            )
        return self._tokenizer

    def reference(self, images: Sequence[Image.Image]) -> Reference:
        """What the first stage takes from the reference images of an edit.

        Raises GenerationError for features that are not finite.
        """
        tokenizer = self.require_editing()
        size = tokenizer.config.image_size
        encoded = [tokenizer.encode(tower_pixels(image, size)) for image in images]
        hashes = tuple(pixels_sha256(image) for image in images)
        features = torch.cat([found.flatten(0, 1) for found, _ in encoded])
        if not bool(features.isfinite().all()):
            raise GenerationError("the image tokenizer's features of the reference image are not finite")
        if self._feature_connector is not None:  # the features stand for the embeddings of the tokens
            ids = [self._prompts.image_pad_id] * len(features)
            return Reference(ids, self._feature_connector(features), sha256=hashes)
        start = self.config.image_tokens.image_token_range.start
        ids = [start + code for _, codes in encoded for code in codes.flatten().tolist()]
        return Reference(ids, sha256=hashes)

    def requests(
        self,
        prompt: str,
        samples: Sequence[SamplingParams],
        reference: Reference = NO_REFERENCE,
        draft_window: int | None = None,
    ) -> list[PlanRequest]:
        """An image of every sample, of a prompt that `check` let pass.

        draft_window: as `check_draft_window` returns it. Raises PromptError where prompt and reference are
        too long, or have ids that the decoder does not know.
        """
        ids, span = self._prompts.encode(prompt, reference.token_ids)
        if max(ids) >= self.config.ar.vocab_size:
            accepted = f"accepted is 0 to {self.config.ar.vocab_size - 1}"
            raise PromptError(f"the prompt has ids outside the vocabulary: {accepted}")
        return [
            PlanRequest(prompt, reference, TokenPrompt(ids, sample, reference.features, span, draft_window))
            for sample in samples
        ]

    def plans(self, requests: Sequence[PlanRequest], run: Run) -> list[Plan]:
        """The plan of every request, in order; a failed one has an error."""
        count = self.config.image_tokens.tokens_per_image * len(requests)
        with trace.span("plan"), run.stage("tokens", count) as update:
            drawn = self.engine.generate([request.tokens for request in requests], update)
        run.passes += sum(tokens.passes for tokens in drawn)
        return [self.plan(request, tokens) for request, tokens in zip(requests, drawn, strict=True)]

    def replay(self, request: PlanRequest, token_ids: Tensor) -> Plan:
        """The plan of a request from given tokens, int64 [T]."""
        with trace.span("plan"):
            tokens = self.engine.replay(request.tokens, token_ids)
        return replace(self.plan(request, tokens), replayed=True)

    def log_probs(self, plan: Plan) -> tuple[Tensor, Tensor]:
        """Raw and processed log-probabilities, float32 [T], of the tokens of a plan that was drawn here."""
        return token_log_probs(
            self.engine.decoder,
            self.config.image_tokens,
            plan.sampling,
            plan.hidden_states[0, :-1],
            plan.token_ids[0],
        )

    def check_token_ids(self, token_ids: Tensor | Sequence[int]) -> Tensor:
        """One image's tokens to replay, int64 [T].

        Raises ParameterError for another number of them, or ids outside the vocabulary.
        """
        count, vocabulary = self.config.image_tokens.tokens_per_image, self.config.ar.vocab_size
        accepted = f"accepted are {count} integers, [{count}] or [1, {count}]"
        check_dense("token_ids", token_ids)
        try:
            found = torch.as_tensor(token_ids, device="cpu")
        except Exception:  # torch raises whatever the caller's objects lead it to
            raise ParameterError(f"token_ids is {shown(token_ids)}: {accepted}") from None
        if found.dtype not in (torch.int32, torch.int64) or tuple(found.shape) not in ((count,), (1, count)):
            raise ParameterError(f"token_ids is {found.dtype} {list(found.shape)}: {accepted}")
        if int(found.min()) < 0 or int(found.max()) >= vocabulary:
            raise ParameterError(
                f"token_ids has ids outside the vocabulary: accepted is 0 to {vocabulary - 1}"
            )
        return found.reshape(count).to(torch.int64)

    def plan(self, request: PlanRequest, tokens: TokenPlan) -> Plan:
        """The plan that the token engine's result for a request makes."""
        token_ids = tokens.token_ids.cpu()
        image_tokens = self.config.image_tokens.image_token_range
        others = [i for i, token in enumerate(token_ids.tolist()) if token not in image_tokens]
        return Plan(
            prompt=request.prompt,
            prompt_ids=torch.tensor([request.tokens.ids]),
            token_ids=token_ids[None],
            hidden_states=tokens.hidden_states[None],
            sampling=request.tokens.sampling,
            reference_latents=request.reference.latents,
            reference_sha256=request.reference.sha256,
            non_image_positions=tuple(others),
            switches=self._switches,
            error=tokens.error,
        )
