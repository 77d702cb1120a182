"""The rows of a batch, read one by one from a file of prompts; one that cannot be read costs only itself."""

from __future__ import annotations

import base64
import binascii
import csv
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from blip3o_rt.errors import ImageError, ParameterError, first_line
from blip3o_rt.images import ADDRESS, decode_reference

PROMPT, IMAGE = "prompt", "image"  # columns that are read; others are kept beside the image
HASHED_AT_ONCE = 2**24


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        index: Its number in the file, from 0; its image has the seed of the batch plus it.
        prompt: What to draw, or what to change.
        images: Reference images of an edit: paths, or the bytes of a file in base64 after "base64:".
        extra: Other columns.
        error: Why it cannot be drawn, if it cannot be read.
    """

    index: int
    prompt: str = ""
    images: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self), ensure_ascii=True, default=str)

    @classmethod
    def from_json(cls, line: str) -> Row:
        """The row of a line."""
        return cls(**json.loads(line))

    def references(self, folder: Path) -> list[Any]:
        """The reference images as the pipeline takes them; paths are relative to a folder.

        Raises ParameterError for a row that could not be read, ImageError for bytes that are no image.
        """
        if self.error is not None:
            raise ParameterError(self.error)
        return [
            _decoded(image[7:])
            if image.startswith("base64:")
            else image
            if ADDRESS.match(image) or image.startswith("~")
            else folder / image
            for image in self.images
        ]


def _decoded(text: str) -> Image.Image:
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"the row's image is not base64: {first_line(error)}") from None
    return decode_reference(data, "the row's image")


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a .txt (a prompt a line), .csv or .jsonl (or .parquet) with a column "prompt".

    Raises ParameterError for a file that has no such rows at all.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise ParameterError(f"{path} is not read: accepted are {', '.join(READERS)}")
    if not path.is_file():
        raise ParameterError(f"{path} is missing: give a file of prompts")
    return reader(path)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(HASHED_AT_ONCE):
            digest.update(piece)
    return digest.hexdigest()


def _lines(path: Path) -> Iterator[tuple[int, str | None]]:
    """The lines of a file, None for one that is not UTF-8."""
    with path.open("rb") as file:
        for index, line in enumerate(file):
            try:
                yield index, line.decode("utf-8-sig" if index == 0 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError:
                yield index, None


def _read_text(path: Path) -> Iterator[Row]:
    for index, line in _lines(path):
        yield Row(index, line) if line is not None else Row(index, error="the line is not UTF-8")


def _read_json_lines(path: Path) -> Iterator[Row]:
    for index, line in _lines(path):
        if line is None:
            yield Row(index, error="the line is not UTF-8")
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield Row(index, error=f"the line is not JSON: {first_line(error)}")
        else:
            yield _row(index, value)


def _read_csv(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file)
        if PROMPT not in (reader.fieldnames or []):
            raise ParameterError(
                f"{path} has the columns {reader.fieldnames}: accepted is one named 'prompt'"
            )
        index = 0
        while True:
            try:
                value = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield Row(index, error=f"the row is not CSV: {first_line(error)}")
            else:
                uneven = None in value or None in value.values()
                yield (
                    Row(index, error="the row has more or fewer columns than the first")
                    if uneven
                    else _row(index, {name: text for name, text in value.items() if text or name == PROMPT})
                )
            index += 1


def _csv_row(index: int, value: dict[Any, Any]) -> Row:
    if None in value or None in value.values():
        return Row(index, error="the row has more or fewer columns than the first")
    return _row(index, {name: text for name, text in value.items() if text or name == PROMPT})


def _no_prompts(path: Path, columns: object) -> ParameterError:
    return ParameterError(f"{path} has the columns {columns}: accepted is one named 'prompt'")


def _read_parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise ParameterError(f"{path} needs {error.name}: pip install 'blip3o_rt[ray]'") from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ParameterError(f"{path} is not read: {first_line(error)}") from None
    with file:
        if PROMPT not in file.schema_arrow.names:
            raise _no_prompts(path, file.schema_arrow.names)
        index = 0
        for batch in file.iter_batches(batch_size=256):
            for value in batch.to_pylist():
                yield _row(index, value)
                index += 1


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".txt": _read_text,
    ".csv": _read_csv,
    ".jsonl": _read_json_lines,
    ".parquet": _read_parquet,
}


def _row(index: int, value: Any) -> Row:
    """The row of a mapping of columns."""
    if not isinstance(value, Mapping) or not isinstance(value.get(PROMPT), str):
        return Row(index, error="the row has no text under 'prompt'")
    texts = [text for text in value.values() if isinstance(text, str)]
    if any("\udc80" <= character <= "\udcff" for text in texts for character in text):
        return Row(index, error="the row is not UTF-8")
    given = value.get(IMAGE)
    images = [_image(one) for one in (given if isinstance(given, list) else [given] if given else [])]
    if None in images:
        return Row(index, value[PROMPT], error="the row's 'image' is neither a path nor the bytes of a file")
    extra = {name: other for name, other in value.items() if name not in (PROMPT, IMAGE)}
    return Row(index, value[PROMPT], [image for image in images if image], extra)


def _image(value: Any) -> str | None:
    """A path, or the bytes of a file as text: bare, or as data sets keep them, {"bytes": .., "path": ..}."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return f"base64:{base64.b64encode(value).decode()}"
    return value if isinstance(value, str) and value else None
