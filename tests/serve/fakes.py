"""Stages without a model, for tests of everything around them: images are made of prompt and seed alone.

Words of a prompt make things happen: `slow` takes 20 ms a step, `crash` ends the process, `memory` and `bug`
raise, `unread` is dropped by the token engine, `hang` blocks, a step of `alone` and others raises, and any of
`never`. A reference's first sample is in the image.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from blip3o_rt.errors import Blip3oError, GenerationError, PromptError
from blip3o_rt.serve.messages import ModelInfo, RawImage, Submit

TOKENS = 8
SIDE = 8


def load(model: Mapping[str, Any], memory_reserve: int) -> FakeStages:
    time.sleep(model.get("load_seconds", 0.0))
    if "load_holds_seconds" in model:  # the interpreter, as importing a large library does
        ctypes.PyDLL(None).usleep(int(1e6 * model["load_holds_seconds"]))
    if "load_error" in model:
        raise PromptError(model["load_error"])
    if "load_exit" in model:
        os._exit(model["load_exit"])
    return FakeStages(model.get("max_batch", 4))


def fake_image(prompt: str, seed: int, steps: int, reference: int = 0) -> bytes:
    digest = hashlib.sha256(f"{prompt}|{seed}|{steps}|{reference}".encode()).digest()
    return (digest * (SIDE * SIDE * 3 // len(digest) + 1))[: SIDE * SIDE * 3]


@dataclass(eq=False)
class Tokens:
    prompt: str
    seed: int
    drawn: int = 0
    cancelled: bool = False


class FakeStages:
    def __init__(self, max_batch: int = 4, images_per_step: int = 1, joins_underway: bool = True) -> None:
        self.images_per_step, self.joins_underway = images_per_step, joins_underway
        self.info = ModelInfo("fake", SIDE, SIDE, True, 1, TOKENS, max_batch, 64, "cpu", "fp32", "exact")
        self.batch: list[Tokens] = []
        self.log: list[str] = []  # what was done, in order
        self.shared: list[int] = []  # images of each step

    def settings(self) -> AbstractContextManager[object]:
        return nullcontext()

    asleep = False

    def control(self, action: str, value: str = "") -> tuple[int, str]:
        self.log.append(f"{action} {value}".strip())
        return 1, "fake"

    def failure(self, error: Exception) -> tuple[str, str]:
        if isinstance(error, MemoryError):
            return (
                "InsufficientMemoryError",
                "the engine ran out of memory for this request: try a smaller one",
            )
        return (
            (type(error).__name__, str(error))
            if isinstance(error, Blip3oError)
            else ("GenerationError", "no image")
        )

    def check(self, submit: Submit) -> int:
        if not submit.prompt.strip():
            raise PromptError("the prompt is empty; say in words what to draw or change")
        return len(submit.prompt.split())

    def prepare(self, submit: Submit) -> Submit:
        return submit

    def begin_tokens(self, prepared: Submit, seed: int) -> Tokens:
        self.batch.append(Tokens(prepared.prompt, seed))
        self.log.append(f"join {prepared.id} {seed}")
        return self.batch[-1]

    def step_tokens(self) -> None:
        for tokens in list(self.batch):
            if "slow" in tokens.prompt:
                time.sleep(0.02)
            if "unread" in tokens.prompt:
                tokens.cancelled = True
                self.batch.remove(tokens)
                raise RuntimeError("unread")
            tokens.drawn += 1
            if tokens.drawn == TOKENS:
                self.batch.remove(tokens)

    def tokens_drawn(self, tokens: Tokens) -> int:
        return tokens.drawn

    def tokens_done(self, tokens: Tokens) -> bool:
        return tokens.drawn == TOKENS

    def cancel_tokens(self, tokens: Tokens) -> None:
        if tokens in self.batch:
            self.batch.remove(tokens)

    def begin_denoising(self, prepared: Submit, tokens: Tokens) -> FakeDrawing:
        if "bug" in tokens.prompt:
            raise ValueError("a mistake")
        if "nan" in tokens.prompt:
            raise GenerationError("the decoder's logits are not finite")
        if "memory" in tokens.prompt:
            raise MemoryError
        if "crash" in tokens.prompt:
            os._exit(3)
        if "hang" in tokens.prompt:
            time.sleep(3600)
        return FakeDrawing(self, prepared, tokens)

    def step_denoising(self, drawings: Sequence[FakeDrawing]) -> None:
        self.shared.append(len(drawings))
        for kind in (False, True):  # those of a prompt with "second" after the others
            group = [drawing for drawing in drawings if drawing.second is kind]
            for drawing in group:
                drawing.check(len(drawings))
            for drawing in group:
                drawing.step()


class FakeDrawing:
    def __init__(self, stages: FakeStages, submit: Submit, tokens: Tokens) -> None:
        self._stages, self._submit, self._tokens = stages, submit, tokens
        self.done, self.total = 0, int(submit.diffusion.get("steps", 30))
        self.second = "second" in submit.prompt

    def step(self) -> None:
        if "slow" in self._submit.prompt:
            time.sleep(0.02)
        self.done += 1
        self._stages.log.append(f"step {self._submit.id} {self._tokens.seed} {self.done}")

    def check(self, images: int) -> None:
        """What a prompt makes a step raise."""
        if "alone" in self._submit.prompt and images > 1:
            raise MemoryError
        if "never" in self._submit.prompt:
            raise GenerationError("a step failed")

    def preview(self) -> RawImage:
        return RawImage(SIDE, SIDE, bytes([self.done]) * (SIDE * SIDE * 3), {"prompt": self._submit.prompt})

    def close(self) -> None:
        self._stages.log.append(f"close {self._submit.id} {self._tokens.seed}")

    def decode(self) -> RawImage:
        reference = self._submit.references[0].samples[0] if self._submit.references else 0
        samples = fake_image(self._submit.prompt, self._tokens.seed, self.total, reference)
        return RawImage(SIDE, SIDE, samples, {"prompt": self._submit.prompt, "seed": self._tokens.seed})
