"""Uploaded images in, and images of the engine out as PNG, JPEG or WebP; all of it beside the event loop."""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from blip3o_rt.errors import ImageError
from blip3o_rt.images import decode_reference
from blip3o_rt.metadata import text_chunks
from blip3o_rt.serve.messages import RawImage

T = TypeVar("T")
FORMATS = ("png", "jpeg", "webp")
DEFAULT_COMPRESSION = 100  # as OpenAI's: the highest quality


class ImageWorkers:
    """Threads that decode and encode images.

    Args:
        max_pixels: The largest upload.
        threads: How many images are worked on at once.
    """

    def __init__(self, max_pixels: int, threads: int = 2) -> None:
        self.max_pixels = max_pixels
        self._threads = ThreadPoolExecutor(threads, "image")

    async def decode(self, data: bytes, name: str) -> RawImage:
        """An uploaded file as an upright RGB image. Raises ImageError, also for one over the limit."""
        return await self._run(_decode, data, name, self.max_pixels)

    async def encode(self, image: RawImage, output_format: str, compression: int | None) -> bytes:
        """A file of an image; a PNG carries prompt, seed, parameters and version."""
        return await self._run(_encode, image, output_format, compression)

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _run(self, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)


def from_base64(text: str, name: str) -> bytes:
    """The bytes of base64, with or without a data URL's prefix. Raises ImageError."""
    encoded = text.partition(",")[2] if text.startswith("data:") else text
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        raise ImageError(f"{name} is not base64: send the file's bytes in base64, or a data URL") from None


def _decode(data: bytes, name: str, max_pixels: int) -> RawImage:
    if not data:
        raise ImageError(f"{name} is empty: send the file of an image")
    return RawImage.of(decode_reference(data, name, max_pixels))


def _encode(raw: RawImage, output_format: str, compression: int | None) -> bytes:
    image, file = raw.pil(), io.BytesIO()
    if output_format == "png":
        image.save(file, format="PNG", pnginfo=text_chunks(image.info))
    else:
        image.info.clear()
        quality = DEFAULT_COMPRESSION if compression is None else compression
        image.save(file, format=output_format.upper(), quality=quality)
    return file.getvalue()
