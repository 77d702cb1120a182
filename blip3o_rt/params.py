"""Parameters of one request, checked when they are made so that nothing out of range reaches the model."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass

from blip3o_rt.errors import ParameterError

MAX_SEED = 2**63 - 1
MAX_IMAGES = 64
MAX_BATCH = 256
MIN_PROMPT_TOKENS = 16
MAX_PROMPT_TOKENS = 1_000_000
MAX_STEPS = 1000
MAX_GUIDANCE = 100.0
MIN_TEMPERATURE = 1e-5  # logits divided by anything smaller leave float32
MAX_TEMPERATURE = 100.0

PUBLISHED_TOP_K = 1200
PUBLISHED_NUM_IMAGE_TOKENS = 65536


def _integer(name: str, value: object, low: int, high: int, accepted: str) -> int:
    """The value as an int in [low, high], or ParameterError naming what is accepted."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ParameterError(f"{name} is {value!r}: accepted is {accepted}")
    number = int(value)
    if not low <= number <= high:
        raise ParameterError(f"{name} is {number}: accepted is {accepted}")
    return number


def _number(name: str, value: object, accepted: str) -> float:
    """The value as a finite float, or ParameterError naming what is accepted."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ParameterError(f"{name} is {value!r}: accepted is {accepted}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ParameterError(f"{name} is {number}: accepted is {accepted}")
    return number


def _exactly(number: float) -> str:
    """A number in as few digits as it takes to tell it from every other."""
    short = f"{number:g}"
    return short if float(short) == number else repr(number)


def check_seed(seed: object) -> int:
    """A seed, 0 to 2^63 - 1. Raises ParameterError."""
    return _integer("seed", seed, 0, MAX_SEED, "a whole number from 0 to 9223372036854775807")


def image_seeds(seed: object, n: object) -> list[int]:
    """The seeds of the n pictures of one request: seed, seed + 1, ... Raises ParameterError."""
    first = check_seed(seed)
    count = _integer("n", n, 1, MAX_IMAGES, f"a whole number from 1 to {MAX_IMAGES}")
    if first + count - 1 > MAX_SEED:
        raise ParameterError(
            f"seed is {first} with n {count}: the last picture's, seed + n - 1, may be at most {MAX_SEED}"
        )
    return list(range(first, first + count))


def check_max_batch(value: object) -> int:
    """How many pictures are drawn together, 1 to 256. Raises ParameterError."""
    return _integer("max_batch", value, 1, MAX_BATCH, f"a whole number from 1 to {MAX_BATCH}")


def check_max_prompt_tokens(value: object) -> int:
    """Positions kept for a prompt with its reference pictures, 16 to 1,000,000. Raises ParameterError."""
    accepted = f"a whole number from {MIN_PROMPT_TOKENS} to {MAX_PROMPT_TOKENS}"
    return _integer("max_prompt_tokens", value, MIN_PROMPT_TOKENS, MAX_PROMPT_TOKENS, accepted)


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
        temperature_range = f"a number from {MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:g} (greedy is top_k=1)"
        temperature = _number("temperature", self.temperature, temperature_range)
        if not MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE:
            raise ParameterError(f"temperature is {_exactly(temperature)}: accepted is {temperature_range}")
        top_p_range = "a number above 0 and at most 1 (1 is off)"
        top_p = _number("top_p", self.top_p, top_p_range)
        if not 0.0 < top_p <= 1.0:
            raise ParameterError(f"top_p is {_exactly(top_p)}: accepted is {top_p_range}")
        if self.top_k is not None:
            accepted = "a whole number from 0 (off) to the vocabulary's size, or None"
            object.__setattr__(self, "top_k", _integer("top_k", self.top_k, 0, 2**31 - 1, accepted))
        if not isinstance(self.image_tokens_only, bool):
            raise ParameterError(
                f"image_tokens_only is {self.image_tokens_only!r}: accepted is True or False"
            )
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
        steps = _integer("steps", self.steps, 1, MAX_STEPS, f"a whole number from 1 to {MAX_STEPS}")
        guidance_range = f"a number from 0 to {MAX_GUIDANCE:g} (1 is no guidance)"
        guidance = _number("guidance", self.guidance, guidance_range)
        if not 0.0 <= guidance <= MAX_GUIDANCE:
            raise ParameterError(f"guidance is {_exactly(guidance)}: accepted is {guidance_range}")
        object.__setattr__(self, "steps", steps)
        object.__setattr__(self, "guidance", guidance)


@dataclass(frozen=True)
class Progress:
    """What a callback is told: done of total units of "tokens" (with the prompt), "denoise" or "decode"."""

    stage: str
    done: int
    total: int
