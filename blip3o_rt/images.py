"""Reference pictures at the door: what a user holds becomes an upright 8-bit RGB picture or a clear error."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from blip3o_rt.errors import ImageError

ReferenceImage: TypeAlias = "str | os.PathLike[str] | Image.Image | np.ndarray | Tensor"

MAX_SIDE = 16_384
MAX_PIXELS = 64 * 1024 * 1024
MAX_ASPECT_RATIO = 32
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "TIFF", "BMP", "PPM", "JPEG2000", "AVIF", "ICO", "TGA")
# Files that hold further pictures beside the one a viewer shows (previews, gain maps, layers, sizes).
STILL_FORMATS = ("MPO", "ICO")

_LIMITS = (
    f"pictures up to {MAX_SIDE} pixels a side, {MAX_PIXELS} pixels in all and {MAX_ASPECT_RATIO} times as "
    "long as wide are accepted"
)
_ALPHA_MODES = ("RGBA", "LA", "PA", "RGBa", "La")


def load_reference(image: ReferenceImage) -> Image.Image:
    """A reference picture as a new, upright, opaque PIL picture of mode RGB; the argument is left as it was.

    Accepted: the path of a still picture; a PIL picture; an array [H, W] or [H, W, 1, 3 or 4] or a tensor
    [3, H, W] or [1, 3, H, W] of 8-bit or 16-bit unsigned integers or of floats from 0 to 1. EXIF rotation is
    applied, transparency is laid over white, 16-bit and float samples are scaled to 8 bits. The limits
    MAX_SIDE, MAX_PIXELS and MAX_ASPECT_RATIO are checked before any pixel of a file is decoded. Raises
    ImageError for everything else.
    """
    if isinstance(image, Image.Image):
        return _upright_rgb(image, "the picture")
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if isinstance(image, Tensor):
        return _from_tensor(image)
    if isinstance(image, str | os.PathLike):
        return _from_file(Path(image))
    raise ImageError(
        f"a reference picture must be a path, a PIL picture, an array or a tensor, not {type(image).__name__}"
    )


def _from_file(path: Path) -> Image.Image:
    name = repr(str(path))
    with _one_line_errors(name):
        if not path.exists():
            raise ImageError(f"{name} does not exist: give the path of a picture")
        if not path.is_file():
            raise ImageError(f"{name} is not a file: give the path of a picture")
        with path.open("rb") as stream, _opened(stream) as picture:
            return _upright_rgb(picture, name)


@contextmanager
def _one_line_errors(name: str) -> Iterator[None]:
    """What the system and PIL raise, as ImageError: decoders fail however a damaged file leads them to."""
    try:
        yield
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} is too large: {_LIMITS}") from error
    except Image.UnidentifiedImageError as error:
        raise ImageError(f"{name} is not a picture: {', '.join(_formats())} are accepted") from error
    except OSError as error:
        if error.strerror:
            raise ImageError(f"{name} cannot be read: {error.strerror}") from error
        raise ImageError(f"{name} is damaged or cut short: {_first_line(error)}") from error
    except Exception as error:
        raise ImageError(f"{name} cannot be decoded: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _formats() -> list[str]:
    """Those of FORMATS that this machine's PIL reads."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _opened(stream: IO[bytes]) -> Image.Image:
    """PIL's picture with its header read; its warning of large ones is silenced, since ours are refused."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(stream, formats=_formats())


def _upright_rgb(picture: Image.Image, name: str) -> Image.Image:
    with _one_line_errors(name):
        _check_size(picture.width, picture.height, name)
        frames = 1 if picture.format in STILL_FORMATS else getattr(picture, "n_frames", 1)
        if frames > 1:
            raise ImageError(
                f"{name} has {frames} frames and a single still picture is accepted: pick one, for instance "
                "with PIL: picture.seek(0); picture.convert('RGB')"
            )
        picture.load()
        return _to_rgb(ImageOps.exif_transpose(picture), name)


def _check_size(width: int, height: int, name: str) -> None:
    short, long = sorted((width, height))
    if short == 0:
        raise ImageError(f"{name} has no pixels: {width} x {height}")
    if long > MAX_SIDE or width * height > MAX_PIXELS or long > MAX_ASPECT_RATIO * short:
        raise ImageError(f"{name} is {width} x {height} pixels: {_LIMITS}")


def _to_rgb(picture: Image.Image, name: str) -> Image.Image:
    """An opaque RGB copy of any mode: transparency over white, wide samples scaled to 8 bits."""
    if picture.mode == "F" or picture.mode.startswith("I"):
        return Image.fromarray(_wide_samples_to_bytes(picture, name)).convert("RGB")
    if picture.mode in _ALPHA_MODES or "transparency" in picture.info:
        straight = picture.convert("LA") if picture.mode == "La" else picture
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, straight.convert("RGBA")).convert("RGB")
    if picture.mode == "LAB":
        raise ImageError(f"{name} is in the LAB colour space: save it as RGB")
    rgb = picture.convert("RGB")  # a copy, also of an RGB picture
    rgb.info = {}
    return rgb


def _wide_samples_to_bytes(picture: Image.Image, name: str) -> np.ndarray:
    """PIL's grey modes of wide samples: I and I;16 hold 0..65535, F holds 0..1 or, if PIL made it, 0..255."""
    samples = np.asarray(picture)
    low, high = samples.min(), samples.max()
    if picture.mode == "F":
        return _scaled_to_bytes(samples / 255 if low >= 0 and 1 < high <= 255 else samples, name)
    if low < 0 or high > 65535:
        raise ImageError(
            f"{name} has samples from {low} to {high}: 0..65535 is accepted, save it with 16 bits"
        )
    return _scaled_to_bytes(samples.astype(np.uint16), name)


def _scaled_to_bytes(samples: np.ndarray, name: str) -> np.ndarray:
    """Samples of an accepted type as uint8 0..255, rounded to the nearest."""
    kind = samples.dtype.kind + str(samples.dtype.itemsize)
    if kind == "u1":
        return samples
    if kind == "b1":
        return samples.astype(np.uint8) * 255
    if kind == "u2":
        return np.round(samples.astype(np.float32) / 257).astype(np.uint8)
    if samples.dtype.kind not in "fiu":
        raise ImageError(f"{name} has {samples.dtype} samples: uint8, uint16 and floats are accepted")
    low, high = samples.min(), samples.max()
    if samples.dtype.kind == "f" and low >= 0 and high <= 1:
        return np.round(samples.astype(np.float32) * 255).astype(np.uint8)
    raise ImageError(
        f"{name} has {samples.dtype} samples from {low} to {high}: accepted are uint8 0..255, "
        "uint16 0..65535 and floats 0..1"
    )


def _from_array(array: np.ndarray, name: str = "the array") -> Image.Image:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise ImageError(f"a picture array must be [H, W] or [H, W, 1, 3 or 4], not {list(array.shape)}")
    _check_size(array.shape[1], array.shape[0], name)
    samples = _scaled_to_bytes(array, name)
    if samples.shape[2:] == (1,):
        samples = samples[:, :, 0]
    return _to_rgb(Image.fromarray(np.ascontiguousarray(samples)), name)


def _from_tensor(tensor: Tensor) -> Image.Image:
    if tensor.ndim not in (3, 4) or tensor.shape[-3] != 3 or (tensor.ndim == 4 and tensor.shape[0] != 1):
        raise ImageError(f"a picture tensor must be [3, H, W] or [1, 3, H, W], not {list(tensor.shape)}")
    plain = tensor.detach().to("cpu").reshape(tensor.shape[-3:]).permute(1, 2, 0)
    if plain.is_floating_point():
        plain = plain.to(torch.float32)
    return _from_array(plain.numpy(), "the tensor")


def normalised_pixels(image: Image.Image) -> Tensor:
    """An RGB picture as float32 [1, 3, H, W] from -1 (black) to 1: mean 0.5, standard deviation 0.5."""
    samples = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].to(torch.float32)
    return samples.div_(255).sub_(0.5).div_(0.5).contiguous()
