"""PNG files that say how they were made: prompt, seed, parameters and version in text chunks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin, UnidentifiedImageError

from blip3o_rt import __version__
from blip3o_rt.errors import ImageError
from blip3o_rt.files import replacing

FIELDS = ("prompt", "seed", "parameters", "version")


def picture_fields(prompt: str, seed: int, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of one generated picture, as save_png writes and read_metadata returns them."""
    return {
        "prompt": prompt,
        "seed": seed,
        "parameters": dict(parameters),
        "version": f"blip3o_rt {__version__}",
    }


def save_png(image: Image.Image, path: str | Path, fields: Mapping[Any, Any]) -> None:
    """Write a picture as PNG with one UTF-8 text chunk per field; what is not a string is written as JSON.

    fields: of picture_fields, which a generated picture has in its `info`; other entries are not written.

    The file is written beside its target and renamed, so the target is the old file or the whole new one.
    Raises OSError where the folder cannot be written.
    """
    with replacing(path) as temporary, temporary.open("xb") as file:
        image.save(file, format="PNG", pnginfo=text_chunks(fields))


def text_chunks(fields: Mapping[Any, Any]) -> PngImagePlugin.PngInfo:
    """The text chunks of a PNG file that carry an image's fields."""
    chunks = PngImagePlugin.PngInfo()
    for name, value in ((name, fields[name]) for name in FIELDS if name in fields):
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
        chunks.add_itxt(name, text.encode("utf-8", "replace").decode("utf-8"))
    return chunks


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The fields of a PNG written by save_png; fields it does not carry are absent, an ordinary PNG gives {}.

    Raises ImageError where the file is missing or is not a PNG.
    """
    try:
        with Image.open(path) as image:
            if not isinstance(image, PngImagePlugin.PngImageFile):
                raise ImageError(f"{path} is a {image.format} file: accepted is a PNG")
            text = dict(image.text)
    except FileNotFoundError:
        raise ImageError(f"{path} does not exist") from None
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ImageError(f"{path} cannot be read as a PNG: {error}") from error
    return {name: _parse(name, text[name]) for name in FIELDS if name in text}


def _parse(name: str, text: str) -> Any:
    """A field's value: seed and parameters are JSON, the others plain text."""
    if name not in ("seed", "parameters"):
        return str(text)
    try:
        return json.loads(text)
    except ValueError:
        return str(text)
