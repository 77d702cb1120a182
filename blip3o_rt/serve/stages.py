"""The stages of a loaded pipeline in pieces that a scheduler can put in any order.

This is the one file of the service that knows how a pipeline is made.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip3o_rt.ar.engine import Request
from blip3o_rt.dit.denoise import step_together
from blip3o_rt.errors import Blip3oError, GenerationError, ImageError, InsufficientMemoryError
from blip3o_rt.machine import format_bytes, memory
from blip3o_rt.metadata import generated_image
from blip3o_rt.params import DiffusionParams, SamplingParams
from blip3o_rt.pipeline import Pipeline
from blip3o_rt.pipeline.planner import NO_REFERENCE, PlanRequest
from blip3o_rt.result import Plan
from blip3o_rt.serve.messages import ModelInfo, RawImage, Submit

EMBEDDED = "blip3o-next-shapes"
MAX_REFERENCES = 16
MEMORY_SECONDS = 0.1  # between two looks at the free memory, which take longer than the rest of a check


def load(model: Mapping[str, Any], memory_reserve: int) -> Stages:
    """Load a pipeline from the keyword arguments of Pipeline.load."""
    path = model.get("path")
    return Stages(Pipeline.load(**model), Path(path).resolve().name if path else EMBEDDED, memory_reserve)


class Prepared:
    """A request whose references are encoded and whose prompt is ids: what its images have in common."""

    def __init__(self, submit: Submit, request: PlanRequest) -> None:
        self.submit, self.request = submit, request
        self.diffusion = DiffusionParams(**submit.diffusion)


class Stages:
    """A pipeline that runs a piece of work at a time, of any of its requests.

    An image goes through `prepare` (once a request), `begin_tokens`, `step_tokens` until `tokens_done`,
    `begin_denoising`, `step_denoising` until its steps are done, and `decode`.
    """

    def __init__(self, pipeline: Pipeline, name: str, memory_reserve: int = 0) -> None:
        self._pipeline = pipeline
        self._engine = pipeline._planner.engine
        self._memory_reserve = memory_reserve
        self._free_memory, self._next_look = 0, 0.0
        config = pipeline.config
        edits = pipeline._planner.edits
        several = edits and not pipeline._renderer.sees_reference
        self.info = ModelInfo(
            name=name,
            width=config.image_size,
            height=config.image_size,
            edits=edits,
            max_references=(MAX_REFERENCES if several else 1) if edits else 0,
            tokens_per_image=config.image_tokens.tokens_per_image,
            max_batch=self._engine.max_batch,
            max_prompt_tokens=pipeline._planner.max_prompt_tokens,
            device=str(pipeline.device),
            dtype=pipeline.precision,
            tier=pipeline.tier,
        )

    def settings(self) -> AbstractContextManager[object]:
        """Torch's settings as the pipeline needs them, for everything below."""
        return self._pipeline._isolation.turn()

    def check(self, submit: Submit) -> int:
        """The number of tokens of a request's prompt.

        Raises Blip3oError for what could never run, or where the memory is short, before any computation.
        """
        pipeline = self._pipeline
        DiffusionParams(**submit.diffusion)
        for _, seed in submit.seeds:
            pipeline._planner.check([submit.prompt], SamplingParams(seed, **submit.sampling))
        if len(submit.references) > self.info.max_references:
            if not self.info.edits:
                raise ImageError("this checkpoint has no image tokenizer and only draws from text")
            raise ImageError(
                f"{len(submit.references)} reference images were given: "
                f"accepted is {'1' if self.info.max_references == 1 else f'1 to {self.info.max_references}'}"
            )
        needed = self._memory_reserve + sum(12 * len(image.samples) for image in submit.references)
        free = self._free()
        if needed > free:
            raise InsufficientMemoryError(
                f"the request needs {format_bytes(needed)} of free memory, there are {format_bytes(free)}: "
                "try again later"
            )
        return pipeline._planner.count_tokens(submit.prompt, len(submit.references))

    def _free(self) -> int:
        """Bytes of free memory: the first of requests that come together looks for all of them."""
        if time.monotonic() >= self._next_look:
            self._free_memory, self._next_look = memory().available, time.monotonic() + MEMORY_SECONDS
        return self._free_memory

    def prepare(self, submit: Submit) -> Prepared:
        """Encode the references of a request and its prompt."""
        images = [image.pil() for image in submit.references]
        reference = NO_REFERENCE
        if images:
            with self._pipeline._run() as run:
                reference = self._pipeline._reference(images, run)
        sampling = SamplingParams(**submit.sampling)
        (request,) = self._pipeline._planner.requests(
            submit.prompt, [sampling], reference, submit.draft_window
        )
        return Prepared(submit, request)

    def begin_tokens(self, prepared: Prepared, seed: int) -> Request:
        """Put one image into the token batch."""
        prompt = prepared.request.tokens
        sampling = dataclasses.replace(prompt.sampling, seed=seed)
        return self._engine.submit(dataclasses.replace(prompt, sampling=sampling))

    def step_tokens(self) -> None:
        """Draw at least one token of every image in the batch."""
        self._engine.step()

    def tokens_drawn(self, tokens: Request) -> int:
        """How many tokens an image has."""
        return tokens.num_generated

    def tokens_done(self, tokens: Request) -> bool:
        """Whether an image's last token is drawn. Raises GenerationError where its request was dropped."""
        if tokens.cancelled:
            raise GenerationError("the prompt could not be read")
        return tokens.done

    def cancel_tokens(self, tokens: Request) -> None:
        """Take an image out of the token batch."""
        self._engine.cancel(tokens)

    def begin_denoising(self, prepared: Prepared, tokens: Request) -> Drawing:
        """Begin to denoise an image whose tokens are done. Raises the plan's own GenerationError."""
        found = tokens.plan
        assert found is not None
        if found.error is not None:
            raise found.error
        request = dataclasses.replace(prepared.request, tokens=tokens.prompt)
        return Drawing(self._pipeline, self._pipeline._planner.plan(request, found), prepared.diffusion)

    @property
    def images_per_step(self) -> int:
        """How many images may be between `begin_denoising` and `close`: those that share a step."""
        return self._pipeline._renderer.images_per_step

    @property
    def joins_underway(self) -> bool:
        """Whether images may join others between two steps, because a step of several costs little more."""
        return self._pipeline.device.type == "cuda"

    @staticmethod
    def step_denoising(drawings: Sequence[Drawing]) -> None:
        """Make the next step of each image."""
        step_together([drawing.denoising for drawing in drawings])

    def control(self, action: str, value: str = "") -> tuple[int, str]:
        """ "update" the weights from a folder, "sleep", "wake", or nothing.

        Returns the weights' version and checksum. Raises Blip3oError.
        """
        pipeline = self._pipeline
        if action == "update":
            pipeline.update_weights(value)
        elif action == "sleep":
            self._engine = None  # type: ignore[assignment]
            pipeline.sleep()
        elif action == "wake":
            pipeline.wake()
            self._engine = pipeline._planner.engine
        return pipeline.weights_version, pipeline.weights_checksum()

    @property
    def asleep(self) -> bool:
        """Whether it was put to sleep and has not been woken."""
        return self._pipeline.asleep

    @staticmethod
    def failure(error: Exception) -> tuple[str, str]:
        """The kind and the line of what a stage raised; raises it again where the process cannot go on."""
        if isinstance(error, getattr(torch, "AcceleratorError", ())):
            raise error
        if isinstance(error, Blip3oError):
            return type(error).__name__, str(error)
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "memory" in str(error).lower():
            return (
                "InsufficientMemoryError",
                "the engine ran out of memory for this request: try a smaller one",
            )
        return "GenerationError", f"the image could not be drawn: {type(error).__name__}"


class Drawing:
    """One image between its tokens and its pixels; `close` it, finished or not."""

    def __init__(self, pipeline: Pipeline, plan: Plan, params: DiffusionParams) -> None:
        self._pipeline, self._plan, self._params = pipeline, plan, params
        noise = pipeline._renderer.noise(plan.sampling.seed)
        self._stack = ExitStack()
        self.denoising = self._stack.enter_context(pipeline._renderer.denoising(plan, params, noise))

    def close(self) -> None:
        """Give the buffers of the steps back."""
        self._stack.close()

    @property
    def done(self) -> int:
        """Steps made."""
        return self.denoising.done

    @property
    def total(self) -> int:
        """Steps to make."""
        return self.denoising.total

    def preview(self) -> RawImage:
        """The decoded estimate of the clean latent that the last step was made on."""
        return self._decoded(self.denoising.estimate)

    def decode(self) -> RawImage:
        """The finished image."""
        return self._decoded(self.denoising.latent)

    def _decoded(self, latent: Tensor) -> RawImage:
        fields = self._pipeline._renderer.fields(self._plan, self._params, self._plan.sampling.seed)
        return RawImage.of(generated_image(self._pipeline._renderer.decode(latent), fields))
