"""PNG files that say how they were made: their chunks, and the metadata of a generated image."""

from __future__ import annotations

import json
import os
import threading
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from blip3o_rt import __version__
from blip3o_rt.errors import Blip3oWarning, ImageError
from blip3o_rt.files import replacing

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
NEEDED_CHUNKS = (b"IHDR", b"PLTE", b"tRNS")
MAX_TEXT = 2**20  # bytes of one text that is read
KEY = "blip3o_rt"  # of the text that holds the fields; other programs parse "prompt" and "parameters"
OLD_KEYS = ("prompt", "seed", "parameters", "version")  # each a text of its own, until 0.1
FIELDS = (*OLD_KEYS, "task", "references", "checkpoint", "dtype", "device")
_filters = threading.RLock()  # Python keeps one list of warning filters for all threads


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Within the block PIL's warnings of damaged metadata are dropped. Those of ours follow it."""
    with _filters, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", Blip3oWarning)
        yield
    for warning in caught:
        warnings.warn(warning.message, stacklevel=2)


def png_chunks(stream: IO[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """Kind and data of each whole chunk. Raises OSError where one that is needed is damaged or cut short."""
    if stream.read(8) != PNG_SIGNATURE:
        raise OSError("it does not begin as a PNG")
    while len(header := stream.read(8)) == 8:
        length, kind = int.from_bytes(header[:4], "big"), header[4:]
        data, checksum = stream.read(length), stream.read(4)
        if kind != b"IDAT" and checksum != zlib.crc32(kind + data).to_bytes(4, "big"):
            if kind in NEEDED_CHUNKS or not kind.isalpha():
                raise OSError(f"its chunk {kind.decode('latin-1')!r} is damaged")
            continue
        if len(data) < length:
            raise OSError("its pixels end early")
        if kind == b"IEND":
            return
        yield kind, data


def inflated(data: bytes, limit: int) -> bytes | None:
    """zlib's data decompressed; None where it is damaged or has more than `limit` bytes."""
    inflate = zlib.decompressobj()
    try:
        found = inflate.decompress(data, limit)
    except zlib.error:
        return None
    return found if inflate.eof else None


def text_of(kind: bytes, data: bytes) -> tuple[str, str] | None:
    """Keyword and text of a text chunk; None for another chunk and for text that cannot be read."""
    keyword, _, rest = data.partition(b"\0")
    encoding = "utf-8" if kind == b"iTXt" else "latin-1"
    content: bytes | None = rest
    if kind == b"zTXt":
        content = inflated(rest[1:], MAX_TEXT)
    elif kind == b"iTXt":
        content = rest[2:].partition(b"\0")[2].partition(b"\0")[2]  # after language and translated keyword
        if rest[:1] == b"\1":
            content = inflated(content, MAX_TEXT)
    elif kind != b"tEXt":
        return None
    if content is None or len(content) > MAX_TEXT:
        return None
    return keyword.decode("latin-1"), content.decode(encoding, "replace")


def path_text(path: object) -> str:
    """A path as text. Raises ImageError for what is none."""
    try:
        text = os.fspath(path)  # type: ignore[call-overload]
    except Exception as error:  # whatever its __fspath__ raises
        raise ImageError(f"a {type(path).__name__} is not a path: give the path of an image") from error
    if not isinstance(text, str):
        raise ImageError(f"a path of {type(text).__name__} is not read: give a string")
    return text


def shown(path: str) -> str:
    """A path as messages show it: quoted, in one line, and cut where it is very long."""
    return repr(path if len(path) <= 300 else f"{path[:100]}...{path[-30:]}")


def image_fields(prompt: str, seed: int, parameters: Mapping[str, Any], **origin: Any) -> dict[str, Any]:
    """The metadata of one generated image, as save_png writes and read_metadata returns it.

    Args:
        prompt: Its words.
        seed: Of its noise.
        parameters: How it was sampled and denoised, by parameter name.
        **origin: Others of FIELDS: task, references, checkpoint, dtype, device.
    """
    version = f"blip3o_rt {__version__}"
    return {"prompt": prompt, "seed": seed, "parameters": dict(parameters), "version": version, **origin}


class GeneratedImage(Image.Image):
    """An image that carries its metadata in `info` and keeps it where it is saved as PNG."""

    def save(self, fp: Any, format: str | None = None, **params: Any) -> None:
        """Save as PIL does; a PNG gets the metadata too, unless `pnginfo` says what to write."""
        name = str(fp if isinstance(fp, str | os.PathLike) else getattr(fp, "name", ""))
        if "pnginfo" not in params and (format or Path(name).suffix[1:]).upper() == "PNG":
            params["pnginfo"] = text_chunks(self.info)
        super().save(fp, format, **params)


def eight_bit(pixels: Tensor) -> Tensor:
    """Pixels [1, 3, H, W] in 0..1 as levels, uint8 [3, H, W] on the CPU."""
    return (pixels[0].float() * 255).round().to(torch.uint8).cpu()


def generated_image(pixels: Tensor, fields: Mapping[str, Any]) -> GeneratedImage:
    """Pixels [1, 3, H, W] in 0..1 as an 8-bit image that carries its metadata in `info`."""
    levels = eight_bit(pixels).permute(1, 2, 0).contiguous().numpy()
    image = GeneratedImage()
    plain = Image.fromarray(levels)
    image.__setstate__([dict(fields), plain.mode, plain.size, None, plain.tobytes()])
    return image


def text_chunks(fields: Mapping[Any, Any]) -> PngImagePlugin.PngInfo:
    """The fields as one UTF-8 text chunk of JSON; none where there are no fields."""
    chunks = PngImagePlugin.PngInfo()
    ours = {name: fields[name] for name in FIELDS if name in fields}
    if ours:
        text = json.dumps(ours, ensure_ascii=False)
        chunks.add_itxt(KEY, text.encode("utf-8", "replace").decode("utf-8"))
    return chunks


def save_png(image: Image.Image, path: str | Path, fields: Mapping[Any, Any], *, new: bool = False) -> None:
    """Write an image as PNG with its metadata; the target is the old file or the whole new one.

    Args:
        image: What to write.
        path: The file.
        fields: Of image_fields, which a generated image has in its `info`; other entries are not written.
        new: Replace nothing.

    Raises:
        FileExistsError: The file is there, and `new` was asked for.
        OSError: The file cannot be written; it names the file.
    """
    chunks = text_chunks(fields)
    with replacing(path, new=new) as temporary, temporary.open("xb") as file:
        image.save(file, format="PNG", pnginfo=chunks)


def save_free(image: Image.Image, paths: Iterable[Path], fields: Mapping[Any, Any]) -> Path:
    """Write an image to the first of these paths that is free or holds the same request; returns it.

    Other processes may write to the same folder: each image gets a name of its own.
    """
    for path in paths:
        if not os.path.lexists(path):
            with suppress(FileExistsError):  # made by another process meanwhile
                save_png(image, path, fields, new=True)
                return path
        if holds_request(path, fields):
            save_png(image, path, fields)
            return path
    raise FileExistsError("no name is free")


def holds_request(path: Path, fields: Mapping[Any, Any]) -> bool:
    """Whether a file is a PNG of the request that these fields are of, whichever version wrote it."""
    try:
        found = read_metadata(path)
    except ImageError:
        return False
    ours = json.loads(json.dumps({name: fields[name] for name in FIELDS if name in fields}))
    return bool(found) and found | {"version": ""} == ours | {"version": ""}


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata of a PNG that this package wrote, this release or an earlier one.

    Args:
        path: The file.

    Returns:
        Those of FIELDS that it carries; {} for an ordinary PNG.

    Raises:
        ImageError: The file is missing or is not a PNG.
    """
    name = shown(path_text(path))
    try:
        with Path(path).expanduser().open("rb") as stream:
            texts = dict(text for chunk in png_chunks(stream) if (text := text_of(*chunk)) is not None)
    except FileNotFoundError:
        raise ImageError(f"{name} does not exist") from None
    except OSError as error:
        if error.strerror:
            raise ImageError(f"{name} cannot be read: {error.strerror}") from error
        raise ImageError(f"{name} {_not_png(path, error)}") from error
    except (ValueError, RuntimeError) as error:  # of a NUL in it, of no home
        raise ImageError(f"{name} is not the path of a PNG: {error}") from error
    if KEY in texts:
        found = _json(texts[KEY])
        return {field: found[field] for field in FIELDS if field in found} if isinstance(found, dict) else {}
    return {
        field: _json(texts[field]) if field in ("seed", "parameters") else texts[field]
        for field in OLD_KEYS
        if field in texts
    }


def _not_png(path: str | os.PathLike[str], error: OSError) -> str:
    try:
        with quiet_pillow(), Image.open(path) as image:
            if image.format != "PNG":
                return f"is a {image.format} file: accepted is a PNG"
    except Exception:  # PIL's, whatever it does not know
        pass
    return f"cannot be read as a PNG: {error}"


def _json(text: str) -> Any:
    """The value of JSON; the text itself where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
