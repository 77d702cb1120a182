"""Parameters of one request, checked when they are made so that nothing out of range reaches the model."""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, cast

from blip3o_rt.errors import ImageError, ParameterError, PromptError, shown

if TYPE_CHECKING:
    from blip3o_rt.images import ReferenceImage

DEFAULT_BATCH = 4
DEFAULT_PROMPT_TOKENS = 1536
OUTPUTS = ("pil", "tensor", "latent")  # what a rendering gives

MAX_SEED = 2**63 - 1
MAX_IMAGES = 64
MAX_BATCH = 256
MAX_DRAFT_WINDOW = 16
AUTO = "auto"
MIN_PROMPT_TOKENS = 16
MAX_PROMPT_TOKENS = 1_000_000
MAX_STEPS = 1000
MAX_GUIDANCE = 100.0
MIN_TEMPERATURE = 1e-5  # logits divided by anything smaller leave float32
MAX_TEMPERATURE = 100.0

PUBLISHED_TOP_K = 1200
PUBLISHED_NUM_IMAGE_TOKENS = 65536


def _integer(name: str, value: object, low: int, high: int, accepted: str = "") -> int:
    """The value as an int in [low, high], or ParameterError naming what is accepted."""
    accepted = accepted or f"a whole number from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not low <= int(value) <= high:
        raise ParameterError(f"{name} is {shown(value)}: accepted is {accepted}")
    return int(value)


def _number(name: str, value: Any, low: float, high: float, accepted: str) -> float:
    """The value as a float in [low, high], or ParameterError naming what is accepted."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or not low <= cast(float, value) <= high:
        raise ParameterError(f"{name} is {shown(value)}: accepted is {accepted}")
    return float(value)


def check_flag(name: str, value: object) -> None:
    """Raise ParameterError unless the value is True or False."""
    if not isinstance(value, bool):
        raise ParameterError(f"{name} is {shown(value)}: accepted is True or False")


def check_choice(name: str, value: object, accepted: Sequence[str]) -> None:
    """Raise ParameterError unless the value is one of the accepted texts."""
    if not isinstance(value, str) or value not in accepted:
        raise ParameterError(f"{name} is {shown(value)}: accepted are {', '.join(accepted)}")


def check_callback(name: str, callback: object, *arguments: str) -> None:
    """Raise ParameterError unless the value is None or can be called with so many arguments."""
    if callback is None:
        return
    accepted = f"accepted is a function of ({', '.join(arguments)}), or None"
    if not callable(callback) or isinstance(callback, type):
        raise ParameterError(f"{name} is {shown(callback)}: {accepted}")
    try:
        inspect.signature(callback).bind(*arguments)
    except ValueError:  # written in C, without a signature
        return
    except TypeError as error:
        raise ParameterError(f"{name} cannot be called ({error}): {accepted}") from None


def check_dense(name: str, tensor: Any) -> None:
    """Raise ParameterError for a tensor without plain values in memory: sparse, nested, quantized or meta."""
    kind = str(getattr(tensor, "layout", "torch.strided")).removeprefix("torch.")
    for flag in ("is_quantized", "is_meta", "is_nested"):
        kind = flag.removeprefix("is_") if getattr(tensor, flag, False) is True else kind
    if kind != "strided":
        raise ParameterError(f"{name} is a {kind} tensor: accepted is a dense one that holds its values")


def prompt_list(prompt: str | Sequence[str]) -> list[str]:
    """The prompts of a call as a list. Raises PromptError for what is neither text nor a list of texts."""
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list | tuple) or not prompt:
        raise PromptError(f"prompt is {shown(prompt)}: accepted is a string, or a list of at least one")
    return list(prompt)


@contextmanager
def which_prompt(index: int, count: int) -> Iterator[None]:
    """Say which prompt of a list it was, in the PromptError of a block that works on one."""
    try:
        yield
    except PromptError as error:
        if count == 1:
            raise
        raise PromptError(f"prompt {index + 1} of {count}: {error}") from error


def reference_list(images: ReferenceImage | Sequence[ReferenceImage]) -> list[ReferenceImage]:
    """The reference images of a call as a list. Raises ImageError where there is none."""
    found = list(images) if isinstance(images, list | tuple) else [images]
    if not found or found[0] is None:
        raise ImageError("an edit needs at least one reference image")
    return found  # type: ignore[return-value]


def check_seed(seed: object) -> int:
    """A seed, 0 to 2^63 - 1. Raises ParameterError."""
    return _integer("seed", seed, 0, MAX_SEED)


def image_seeds(seed: object, n: object) -> list[int]:
    """The seeds of the n images of one request: seed, seed + 1, ... Raises ParameterError."""
    first = check_seed(seed)
    count = _integer("n", n, 1, MAX_IMAGES)
    if first + count - 1 > MAX_SEED:
        raise ParameterError(
            f"seed is {first} with n {count}: the last image's, seed + n - 1, may be at most {MAX_SEED}"
        )
    return list(range(first, first + count))


def check_draft_window(value: object) -> int | None:
    """Rows of an image in a pass of the decoder, 1 to 16, or None for "auto". Raises ParameterError."""
    if isinstance(value, str) and value == AUTO:
        return None
    accepted = f'"{AUTO}", or a whole number from 1 (a token a pass) to {MAX_DRAFT_WINDOW}'
    return _integer("draft_window", value, 1, MAX_DRAFT_WINDOW, accepted)


def check_max_batch(value: object) -> int:
    """How many images are drawn together, 1 to 256. Raises ParameterError."""
    return _integer("max_batch", value, 1, MAX_BATCH)


def check_max_prompt_tokens(value: object) -> int:
    """Positions kept for a prompt with its reference images, 16 to 1,000,000. Raises ParameterError."""
    return _integer("max_prompt_tokens", value, MIN_PROMPT_TOKENS, MAX_PROMPT_TOKENS)


@dataclass(frozen=True)
class SamplingParams:
    """How the image tokens are drawn: temperature, then top_k, then top_p, at one seed.

    top_k: None is the published 1200 scaled to the checkpoint's codebook, 0 is off, 1 is greedy.
    image_tokens_only: draw among the image tokens alone; False draws over the whole vocabulary.
    Raises ParameterError on a value of the wrong type or out of range.
    """

    seed: int = 0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 0.95
    image_tokens_only: bool = True

    def __post_init__(self) -> None:
        temperatures = f"a number from {MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:g} (greedy is top_k=1)"
        temperature = _number("temperature", self.temperature, MIN_TEMPERATURE, MAX_TEMPERATURE, temperatures)
        top_p = _number("top_p", self.top_p, math.ulp(0.0), 1.0, "a number above 0 and at most 1 (1 is off)")
        if self.top_k is not None:
            accepted = "a whole number from 0 (off) to the vocabulary's size, or None"
            object.__setattr__(self, "top_k", _integer("top_k", self.top_k, 0, 2**31 - 1, accepted))
        check_flag("image_tokens_only", self.image_tokens_only)
        object.__setattr__(self, "seed", check_seed(self.seed))
        object.__setattr__(self, "temperature", temperature)
        object.__setattr__(self, "top_p", top_p)

    def top_k_for(self, num_image_tokens: int, vocab_size: int) -> int:
        """top_k as the sampler takes it, 0 to vocab_size.

        None becomes the published 1200 of 65,536 codes in proportion to this codebook, at least 1.
        Raises ParameterError where top_k exceeds the vocabulary.
        """
        if self.top_k is None:
            return max(1, round(PUBLISHED_TOP_K * num_image_tokens / PUBLISHED_NUM_IMAGE_TOKENS))
        accepted = f"a whole number from 0 (off) to {vocab_size}, the vocabulary's size"
        return _integer("top_k", self.top_k, 0, vocab_size, accepted)


@dataclass(frozen=True)
class DiffusionParams:
    """How the latent is denoised: Euler steps, and the weight of classifier-free guidance (1 is none).

    Raises ParameterError on a value of the wrong type or out of range.
    """

    steps: int = 30
    guidance: float = 2.0

    def __post_init__(self) -> None:
        steps = _integer("steps", self.steps, 1, MAX_STEPS)
        accepted = f"a number from 0 to {MAX_GUIDANCE:g} (1 is no guidance)"
        guidance = _number("guidance", self.guidance, 0.0, MAX_GUIDANCE, accepted)
        object.__setattr__(self, "steps", steps)
        object.__setattr__(self, "guidance", guidance)


SAMPLING_NAMES = tuple(field.name for field in fields(SamplingParams) if field.name != "seed")
DIFFUSION_NAMES = tuple(field.name for field in fields(DiffusionParams))


def named(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Those of the values that have one of the names."""
    return {name: values[name] for name in names if name in values}
