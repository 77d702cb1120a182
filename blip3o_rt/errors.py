"""Every error a user of the runtime can meet, one class per kind of cause."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

MAX_LINE = 800  # characters of an error
MAX_SHOWN = 80  # characters of a wrong value in an error


class Blip3oError(Exception):
    """Base of all errors raised on purpose by blip3o_rt; the message is one line meant for people."""

    def __init__(self, message: str = "") -> None:
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """The text with what a terminal cannot show as it is escaped (newlines, lone surrogates); cut if long."""
    text = text if len(text) <= MAX_LINE else f"{text[: MAX_LINE // 2]} ... {text[-MAX_LINE // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def shown(value: object) -> str:
    """A wrong value as an error names it: its repr if that is short, else its type and shape."""
    try:
        text = repr(value)
    except Exception:  # an integer of more digits than Python prints, a class of the caller's
        text = ""
    if text and len(text) <= MAX_SHOWN and "\n" not in text:
        return text
    if isinstance(value, str | bytes):
        return f"{text[:MAX_SHOWN]}..."
    shape = getattr(value, "shape", None)
    return f"a {type(value).__name__}" + (f" of shape {list(shape)}" if isinstance(shape, tuple) else "")


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


class AsleepError(Blip3oError):
    """A pipeline that sleeps is asked for an image."""


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
    """What an error says, in one line; the name of its type where it says nothing."""
    return next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)
