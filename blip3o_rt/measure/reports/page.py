"""Pages from templates: everything a page shows is inside its one file."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from blip3o_rt import __version__
from blip3o_rt.files import replacing

MEDIA_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".svg": "image/svg+xml"}


def write_page(template: str, path: str | Path, context: Mapping[str, Any]) -> None:
    """Render a template to a file, written beside its target and renamed."""
    environment = Environment(
        loader=PackageLoader("blip3o_rt.measure.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template(template).render(runtime_version=__version__, **context)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def data_uri(content: bytes, suffix: str) -> str:
    """An image file's bytes as the address of an <img>."""
    return f"data:{MEDIA_TYPES[suffix]};base64,{base64.b64encode(content).decode()}"


def image_uri(file: Path) -> str | None:
    """The same of a file; None where it is missing or no image that a page can show."""
    if file.suffix.lower() not in MEDIA_TYPES or not file.is_file():
        return None
    return data_uri(file.read_bytes(), file.suffix.lower())
