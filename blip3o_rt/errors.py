"""Every error a user of the runtime can meet, one class per kind of cause."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image


class Blip3oError(Exception):
    """Base of all errors raised on purpose by blip3o_rt; the message is one line meant for people."""


class Blip3oWarning(UserWarning):
    """Something of the input was left out or ignored; the message is one line meant for people."""


class ConfigError(Blip3oError):
    """A configuration file names an architecture or a value this runtime does not compute."""


class CheckpointError(Blip3oError):
    """A checkpoint's files or tensors are missing, damaged or of the wrong shape."""


class ParameterError(Blip3oError, ValueError):
    """A generation parameter is out of range."""


class PromptError(ParameterError):
    """A prompt is empty, too long, or not text."""


class ImageError(ParameterError):
    """A reference image cannot be read or used."""


class DeviceError(Blip3oError):
    """The requested device or data type is not available on this machine."""


class InsufficientMemoryError(Blip3oError):
    """The machine has less memory than the request needs; the message says how much that is."""


class ForkError(Blip3oError):
    """A model is used in a process that was forked after a model had been loaded."""


class OpError(Blip3oError):
    """A forced op implementation cannot run the call, or an op was given operands it does not accept."""


class GenerationError(Blip3oError):
    """An image failed while running; its batch-mates are unaffected.

    `images` holds the images of the call in order, None where one failed.
    """

    def __init__(self, message: str, images: Sequence[Image.Image | None] = ()) -> None:
        super().__init__(message)
        self.images = list(images)


class Cancelled(Blip3oError):
    """The caller's callback asked to stop between two tokens or two steps."""


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return next(iter(str(error).splitlines()), type(error).__name__)
