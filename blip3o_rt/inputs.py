"""What a caller hands a request beside its parameters, checked before any work: words, pictures, tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from blip3o_rt.config import ModelConfig
from blip3o_rt.errors import ImageError, ParameterError, PromptError
from blip3o_rt.images import ReferenceImage


def prompt_list(prompt: str | Sequence[str]) -> list[str]:
    """The prompts of a call as a list. Raises PromptError for what is neither text nor a list of texts."""
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list | tuple) or not prompt:
        raise PromptError(f"prompt is {prompt!r}: accepted is a string, or a list of at least one")
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
    """The reference pictures of a call as a list. Raises ImageError where there is none."""
    found = list(images) if isinstance(images, list | tuple) else [images]
    if not found or found[0] is None:
        raise ImageError("an edit needs at least one reference picture")
    return found  # type: ignore[return-value]


def check_noise(noise: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The noise as given. Raises ParameterError unless it is a floating-point tensor of `shape`, finite."""
    if not isinstance(noise, Tensor):
        raise ParameterError(f"noise is a {type(noise).__name__}: accepted is a tensor")
    if tuple(noise.shape) != shape or not noise.is_floating_point():
        raise ParameterError(
            f"noise is {noise.dtype} {list(noise.shape)}: accepted is floating point {list(shape)}"
        )
    if not bool(torch.isfinite(noise).all()):
        raise ParameterError("noise has values that are not finite: accepted are finite numbers")
    return noise


def check_token_ids(token_ids: Tensor | Sequence[int], config: ModelConfig) -> Tensor:
    """One picture's tokens to replay, int64 [T]. Raises ParameterError for another number of them, or ids
    outside the vocabulary."""
    count, vocabulary = config.image_tokens.tokens_per_image, config.ar.vocab_size
    accepted = f"accepted are {count} integers, [{count}] or [1, {count}]"
    try:
        found = torch.as_tensor(token_ids, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise ParameterError(f"token_ids is not a tensor or list of numbers: {accepted}") from None
    if found.dtype not in (torch.int32, torch.int64) or tuple(found.shape) not in ((count,), (1, count)):
        raise ParameterError(f"token_ids is {found.dtype} {list(found.shape)}: {accepted}")
    if int(found.min()) < 0 or int(found.max()) >= vocabulary:
        raise ParameterError(f"token_ids has ids outside the vocabulary: accepted is 0 to {vocabulary - 1}")
    return found.reshape(count).to(torch.int64)
