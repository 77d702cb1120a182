"""Reference images in, PNG files out: reading what a user holds, and files that say how they were made."""

from __future__ import annotations

import hashlib
import io
import os
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageCms, PngImagePlugin
from torch import Tensor

from blip3o_rt import errors, metadata
from blip3o_rt.errors import Blip3oWarning, ImageError, first_line

ReferenceImage: TypeAlias = "str | os.PathLike[str] | Image.Image | np.ndarray | Tensor"

MAX_SIDE = 16_384
MAX_PIXELS = 64 * 1024 * 1024
MAX_ASPECT_RATIO = 32
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "TIFF", "BMP", "PPM", "JPEG2000", "AVIF", "ICO", "TGA")
# Files that hold further images beside the one a viewer shows (previews, gain maps, layers, sizes).
STILL_FORMATS = ("MPO", "ICO")

_LIMITS = (
    f"images up to {MAX_SIDE} pixels a side, {MAX_PIXELS} pixels in all and {MAX_ASPECT_RATIO} times as "
    "long as wide are accepted"
)
MAX_PROFILE = 2**24  # bytes of a color profile; those of cameras and scanners have up to some 3 MB
_KEPT_CHUNKS = (*metadata.NEEDED_CHUNKS, b"IDAT", b"eXIf", b"acTL", b"fcTL", b"fdAT")
_ORIENTATION_TEXTS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
# Orientation in EXIF -> what turns the stored image upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
RAW = "camera raw"
DNG_VERSION, SUBFILE, EXTRA_SAMPLES, SAMPLE_FORMAT = 50706, 254, 338, 339  # tags of a TIFF
# What files that are not read begin with, as a pattern: images, and what is no image of pixels.
_UNREAD_IMAGES = {
    rb"....ftyp(hei|hev|mif1|msf1)": "HEIC",
    rb"....ftypavi[fs]": "AVIF",
    rb"\xff\x0a|\0\0\0\x0cJXL ": "JPEG XL",
    rb"\xffO\xffQ|\0\0\0\x0cjP  ": "JPEG 2000",
    rb"RIFF....WEBP": "WebP",
    rb"II\xbc": "JPEG XR",
    rb"8BPS": "Photoshop",
    rb"v/1\x01": "OpenEXR",
    rb"#\?(RADIANCE|RGBE)": "Radiance HDR",
    rb"DDS ": "DDS",
    rb"qoif": "QOI",
    rb"icns": "ICNS",
    rb"\x0a[\0-\5]\x01": "PCX",
    rb"gimp xcf": "GIMP",
    rb"....ftypcrx|FUJIFILM|IIRO|MMOR|IIU\0|\0MRM|II\*\0....CR\x02": RAW,
    rb"P7\s": "PAM",
    rb"BPG\xfb": "BPG",
    rb"FLIF": "FLIF",
    rb"AT&TFORM": "DjVu",
    rb"SIMPLE  =": "FITS",
    rb".{128}DICM": "DICOM",
    rb"\x01\xda[\0\x01][\x01\x02]": "SGI",
    rb"\0\0\x02\0": "a Windows cursor",
    rb"\xd7\xcd\xc6\x9a|\x01\0\0\0.{36} EMF": "a Windows metafile",
    rb"/\* XPM \*/|#define \S+_width": "an X bitmap",
}
_NO_PIXELS = {
    rb"....(ftyp|moov|mdat)|\x1aE\xdf\xa3|RIFF....AVI ": "a video",
    rb"%PDF": "a PDF",
    rb"%!PS|\xc5\xd0\xd3\xc6": "PostScript",
    rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*(<!DOCTYPE svg[^>]*>\s*)?<svg": "SVG",
    rb"(?i:\s*<(!doctype html|html))": "a web page",
    rb"version https://git-lfs": "a git-lfs pointer, whose file `git lfs pull` fetches",
    rb"PK\x03\x04|\x1f\x8b|Rar!|7z\xbc\xaf": "an archive",
}
ADDRESS = re.compile(r"data:|[a-z][a-z0-9+.-]+:/", re.IGNORECASE)  # how a URL begins, also as a path
_NO_IMAGE = "a reference image must be a path, a PIL image, an array or a tensor, not {}"


def load_reference(image: ReferenceImage) -> Image.Image:
    """Read a reference image.

    EXIF rotation is applied. A color profile is converted to sRGB; one that cannot be used is ignored with a
    Blip3oWarning. Transparency is laid over white. 16-bit and float samples are scaled to 8 bits. The limits
    MAX_SIDE, MAX_PIXELS and MAX_ASPECT_RATIO are checked before any pixel of a file is decoded.

    Args:
        image: The path of a still image; a PIL image; an array [H, W] or [H, W, 1, 3 or 4] or a tensor
            [3, H, W] or [1, 3, H, W] of 8-bit or 16-bit unsigned integers or of floats from 0 to 1. It is
            left as it was.

    Returns:
        A new, upright, opaque PIL image of mode RGB.

    Raises:
        ImageError: For everything else, in one line.
    """
    if isinstance(image, str | os.PathLike):
        return _from_file(metadata.path_text(image))
    for kind, name, read in _READERS:
        if isinstance(image, kind):
            with _reading(name):
                return read(image, name)
    raise ImageError(_NO_IMAGE.format(type(image).__name__))


def decode_reference(data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """`load_reference` of the bytes of a file.

    Args:
        data: The file's content.
        name: What messages call it.
        max_pixels: The most pixels, where fewer than MAX_PIXELS are accepted.

    Returns:
        A new, upright, opaque PIL image of mode RGB.

    Raises:
        ImageError: What is no image that is read, or a larger one.
    """
    name = name if isinstance(name, str) else errors.shown(name)
    with _reading(name):
        return _decoded(io.BytesIO(data), name, max_pixels)


def _from_file(given: str) -> Image.Image:
    name = metadata.shown(given)
    if given.lower().startswith("data:"):
        raise ImageError(
            f"'{given[:24]}...' is a data URI, which is not decoded: save its content and give the path"
        )
    if ADDRESS.match(given):
        raise ImageError(f"{name} is a URL and nothing is fetched: download it and give the path of the file")
    with _reading(name):
        path = Path(given).expanduser()
        if not path.exists():
            raise ImageError(f"{name} does not exist: give the path of an image")
        if not path.is_file():
            raise ImageError(f"{name} is not a file: give the path of an image")
        with path.open("rb") as stream:
            return _decoded(stream, name)


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """What the system and PIL raise, as ImageError: decoders fail however a damaged file leads them to."""
    try:
        with metadata.quiet_pillow():
            yield
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        limit = Image.MAX_IMAGE_PIXELS or MAX_PIXELS
        own = f"this program set PIL's Image.MAX_IMAGE_PIXELS to {limit}" if limit < MAX_PIXELS else _LIMITS
        raise ImageError(f"{name} is too large: {own}") from error
    except OSError as error:
        if error.strerror:
            raise ImageError(f"{name} cannot be read: {error.strerror}") from error
        raise ImageError(f"{name} is damaged or cut short: {first_line(error)}") from error
    except Exception as error:
        raise ImageError(f"{name} cannot be decoded: {first_line(error)}") from error


def _formats() -> list[str]:
    """Those of FORMATS that this machine's PIL reads."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _decoded(stream: IO[bytes], name: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    head = stream.read(512)
    stream.seek(0)
    if head.startswith(metadata.PNG_SIGNATURE):
        png = _Png.read(stream, name, max_pixels)
        with PngImagePlugin.PngImageFile(io.BytesIO(png.data)) as image:
            return _upright_rgb(image, name, png)
    reason = ""
    for format_name in _formats():  # as Image.open does, whose warning of large images would come before us
        factory, accept = Image.OPEN[format_name]
        if accept is not None and accept(head[:16]) is not True:
            continue
        stream.seek(0)
        try:
            found = factory(stream, "")
        except (SyntaxError, IndexError, TypeError, struct.error) as error:
            reason = reason or (f"{format_name}, {first_line(error)}" if accept else "")
            continue
        with found:
            _check_size(found.width, found.height, name, max_pixels)
            if _is_raw(found, head):
                raise ImageError(_not_accepted(name, RAW))
            found.info["no_alpha"] = _says_no_alpha(found, head)
            return _upright_rgb(found, name)
    raise ImageError(_not_read(head, name, reason))


def _is_raw(image: Image.Image, head: bytes) -> bool:
    """Whether a TIFF is a camera's, whose first image is only a preview of what its sensor saw."""
    tags = getattr(image, "tag_v2", {})
    return DNG_VERSION in tags or head[8:10] == b"CR" or bool(tags.get(SUBFILE, 0) & 1)


def _not_accepted(name: str, kind: str) -> str:
    convert = "convert it to PNG or JPEG, as `magick FILE FILE.png` does"
    return f"{name} is in a format that is not read: {kind}; {convert}"


def _not_read(head: bytes, name: str, reason: str = "") -> str:
    """Why a file is refused that no reader takes, from its first bytes and from what a reader said."""
    kind = next((kind for start, kind in _UNREAD_IMAGES.items() if re.match(start, head, re.DOTALL)), None)
    if kind is not None:
        return _not_accepted(name, kind)
    if reason:
        return f"{name} is of a kind that is not read ({reason}): save it with 8 or 16 bits per sample"
    kind = next((kind for start, kind in _NO_PIXELS.items() if re.match(start, head, re.DOTALL)), None)
    accepted = f"{', '.join(_formats())} are accepted"
    return f"{name} is not an image: {accepted}{f' and this is {kind}' if kind else ''}"


def _says_no_alpha(image: Image.Image, head: bytes) -> bool:
    """Whether a file that stores a fourth sample does not promise that it is alpha."""
    if image.format == "TGA":  # bits of alpha per pixel; what the one of 16 bits means is not agreed on
        return head[17] & 15 == 0 or 16 in (head[7], head[16])
    if image.format == "TIFF":
        return EXTRA_SAMPLES not in image.tag_v2  # type: ignore[attr-defined]
    return image.format in ("BMP", "ICO")


def _upright_rgb(image: Image.Image, name: str, png: _Png | None = None) -> Image.Image:
    _check_size(image.width, image.height, name)
    frames = 1 if image.format in STILL_FORMATS else getattr(image, "n_frames", 1)
    if frames > 1:
        raise ImageError(
            f"{name} has {frames} frames and a single still image is accepted: pick one, for instance "
            "with PIL: image.seek(0); image.convert('RGB')"
        )
    image.load()
    color, alpha = _color_and_alpha(image, name, png)
    profile = png.profile if png is not None else image.info.get("icc_profile")
    rgb = color.convert("RGB") if profile is None else _to_srgb(color, profile, name)
    if alpha is not None:
        rgb.putalpha(alpha)
        rgb = Image.alpha_composite(Image.new("RGBA", rgb.size, "white"), rgb).convert("RGB")
    rgb.info = {}
    turn = None
    with suppress(Exception):  # EXIF that cannot be read turns nothing
        turn = _TURNS.get(image.getexif().get(0x0112, 1))  # Orientation
    return rgb if turn is None else rgb.transpose(turn)


def _check_size(width: int, height: int, name: str, max_pixels: int = MAX_PIXELS) -> None:
    short, long = sorted((width, height))
    if short == 0:
        raise ImageError(f"{name} has no pixels: {width} x {height}")
    if width * height > max_pixels < MAX_PIXELS:
        raise ImageError(f"{name} is {width} x {height} pixels: at most {max_pixels} pixels are accepted")
    if long > MAX_SIDE or width * height > MAX_PIXELS or long > MAX_ASPECT_RATIO * short:
        raise ImageError(f"{name} is {width} x {height} pixels: {_LIMITS}")


def _color_and_alpha(
    image: Image.Image, name: str, png: _Png | None
) -> tuple[Image.Image, Image.Image | None]:
    """An image of 8-bit samples without alpha, in its own color space, and its alpha (None: opaque)."""
    if image.mode == "LAB":
        raise ImageError(f"{name} is in the LAB color space: save it as RGB")
    if 2 in np.atleast_1d(getattr(image, "tag_v2", {}).get(SAMPLE_FORMAT, 1)):
        raise ImageError(f"{name} has signed samples, whose white is not known: save it with unsigned ones")
    alpha = None
    if image.mode != "P" and "transparency" in image.info:
        alpha = _color_key_alpha(image, png)
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_wide_samples_to_bytes(image, name)), alpha
    if alpha is not None or not image.has_transparency_data:
        return image.copy(), alpha
    rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    alpha = rgba.getchannel("A")
    if alpha.getextrema() == (0, 0) and image.info.get("no_alpha"):
        alpha = None
    color = rgba.convert("RGB")
    return color.convert("L") if image.mode in ("LA", "La") else color, alpha


def _color_key_alpha(image: Image.Image, png: _Png | None) -> Image.Image:
    """Alpha of an image of which one color is transparent."""
    key = np.asarray(image.info["transparency"])
    samples = np.asarray(image.convert("L") if image.mode == "1" else image)
    if image.mode == "L" and png is not None and png.depth < 8:
        key = key * (255 // (2**png.depth - 1))  # PIL widens the samples, not the key
    elif image.mode == "RGB" and (png.depth == 16 if png else key.max() > 255):  # PIL keeps the high byte
        if png is None:
            key = key >> 8
        else:
            samples = samples.astype(np.uint16) << 8 | png.low_bytes()
    transparent = (samples == key).reshape(*samples.shape[:2], -1).all(-1)
    return Image.fromarray(np.where(transparent, 0, 255).astype(np.uint8))


def _to_srgb(color: Image.Image, profile: bytes, name: str) -> Image.Image:
    """RGB from a color profile to sRGB. A profile that does what sRGB does leaves the bits alone."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(space)
        color = color.convert("L") if color.mode == "1" else color
        if mode is None or (mode != "RGB" and mode != color.mode) or (mode == "RGB" and color.mode == "CMYK"):
            raise ValueError(f"it is of {space}, the image of {color.mode}")
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
        if mode != "CMYK":
            steps = np.arange(0, 256, 17, dtype=np.uint8)
            probe = Image.fromarray(np.stack(np.meshgrid(steps, steps, steps), -1).reshape(64, 64, 3))
            probe = probe.convert(mode)
            change = np.asarray(transform.apply(probe)).astype(int) - np.asarray(probe.convert("RGB"))
            if np.abs(change).max() <= 2:
                return color.convert("RGB")
        return transform.apply(color.convert(mode))
    except Exception as error:  # littlecms raises what the profile's damage leads it to
        warnings.warn(
            f"{name}: its color profile cannot be used ({first_line(error)}) and is ignored",
            Blip3oWarning,
            stacklevel=2,
        )
        return color.convert("RGB")


def _wide_samples_to_bytes(image: Image.Image, name: str) -> np.ndarray:
    """PIL's gray modes of wide samples: I and I;16 hold 0..65535, F holds 0..1 or, if PIL made it, 0..255.

    A TIFF says how many bits its samples have and whether 0 is white.
    """
    tags = getattr(image, "tag_v2", {})
    white_is_zero = tags.get(262) == 0
    samples = np.asarray(image)
    low, high = samples.min(), samples.max()
    if image.mode == "F":
        if 1 < high < 128:
            raise ImageError(
                f"{name} has float samples from {low} to {high}: 0..1 is accepted, and 0..255 where the "
                "largest is 128 or more; divide by the value of white"
            )
        if low >= 0 and 128 <= high <= 255:
            samples = samples / 255
        found = _scaled_to_bytes(samples, name)
        return 255 - found if white_is_zero else found
    if low < 0 or high > 65535:
        raise ImageError(
            f"{name} has samples from {low} to {high}: 0..65535 is accepted, save it with 16 bits"
        )
    if image.mode == "I" and 0 < high <= 255 and image.format in (None, "TIFF"):
        raise ImageError(
            f"{name} has 32-bit samples from {low} to {high}, of 0..255 or of 0..65535: "
            "save it with 8 or with 16 bits"
        )
    largest = 2 ** tags.get(258, (16,))[0] - 1 if image.mode.startswith("I;16") else 65535
    wide = samples.astype(np.float32) * (65535 / largest)
    return _scaled_to_bytes((65535 - wide if white_is_zero else wide).round().astype(np.uint16), name)


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


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise ImageError(f"an image array must be [H, W] or [H, W, 1, 3 or 4], not {list(array.shape)}")
    _check_size(array.shape[1], array.shape[0], name)
    samples = _scaled_to_bytes(array, name)
    if samples.shape[2:] == (1,):
        samples = samples[:, :, 0]
    return _upright_rgb(Image.fromarray(np.ascontiguousarray(samples)), name)


def _from_tensor(tensor: Tensor, name: str) -> Image.Image:
    if tensor.ndim not in (3, 4) or tensor.shape[-3] != 3 or (tensor.ndim == 4 and tensor.shape[0] != 1):
        raise ImageError(f"an image tensor must be [3, H, W] or [1, 3, H, W], not {list(tensor.shape)}")
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        raise ImageError(
            "an image tensor must be dense and hold its values: sparse, meta and quantized ones do not"
        )
    plain = tensor.detach().to("cpu").reshape(tensor.shape[-3:]).permute(1, 2, 0)
    if plain.is_floating_point():
        plain = plain.to(torch.float32)
    return _from_array(plain.numpy(), name)


_READERS: tuple[tuple[type, str, Callable[..., Image.Image]], ...] = (
    (Image.Image, "the image", _upright_rgb),
    (np.ndarray, "the array", _from_array),
    (Tensor, "the tensor", _from_tensor),
)


@dataclass(frozen=True)
class _Png:
    """A PNG without what its pixels do not need, its bits per sample, and its color profile.

    profile: None where there is none, empty where it cannot be read.
    """

    data: bytes
    depth: int
    profile: bytes | None

    @classmethod
    def read(cls, stream: IO[bytes], name: str, max_pixels: int) -> _Png:
        """Read a PNG; the size is checked before the pixels are read. Raises ImageError or OSError."""
        kept, depth, profile, room = [metadata.PNG_SIGNATURE], 8, None, 0
        for kind, data in metadata.png_chunks(stream):
            if kind == b"IHDR" and len(data) == 13:
                width, height, depth = struct.unpack(">IIB", data[:9])
                _check_size(width, height, name, max_pixels)
                room = 10 * width * height + 2**20  # an image of 16 bits has 8 bytes a pixel
            elif kind == b"iCCP":
                profile = metadata.inflated(data.partition(b"\0")[2][1:], MAX_PROFILE) or b""
            elif kind == b"IDAT":
                room -= len(data)
                if room < 0:
                    raise OSError("it holds more than its pixels")
            orientation = data.startswith(_ORIENTATION_TEXTS) and metadata.text_of(kind, data) is not None
            if kind in _KEPT_CHUNKS or orientation:
                kept += [struct.pack(">I", len(data)), kind, data, struct.pack(">I", zlib.crc32(kind + data))]
        if len(kept) < 2 or kept[2] != b"IHDR":
            raise ImageError(_not_read(b"", name))
        kept.append(b"\0\0\0\0IEND\xaeB`\x82")
        return cls(b"".join(kept), depth, profile)

    def low_bytes(self) -> np.ndarray:
        """The low bytes of an RGB image of 16 bits, uint8 [H, W, 3]."""
        with PngImagePlugin.PngImageFile(io.BytesIO(self.data)) as image:
            image.tile = [tile._replace(args="RGB;16L") for tile in image.tile]
            return np.asarray(image)


def normalized_pixels(image: Image.Image) -> Tensor:
    """An RGB image as float32 [1, 3, H, W] from -1 (black) to 1: mean 0.5, standard deviation 0.5."""
    samples = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].to(torch.float32)
    return samples.div_(255).sub_(0.5).div_(0.5).contiguous()


def tower_pixels(image: Image.Image, size: int) -> Tensor:
    """For the vision tower: an RGB image squeezed to size x size (bicubic) -> [1, 3, size, size] in -1..1."""
    return normalized_pixels(image.resize((size, size), Image.Resampling.BICUBIC))


def reference_pixels(image: Image.Image, size: int) -> Tensor:
    """For the autoencoder: the center square of an RGB image -> float32 [1, 3, size, size] in -1..1.

    The short side is resized to `size` (bilinear), the long side in proportion, its fraction dropped; then
    the center is cut out.
    """
    width, height = image.size
    short = min(width, height)
    resized = (int(size * width / short), int(size * height / short))
    left, top = (round((side - size) / 2) for side in resized)
    square = image.resize(resized, Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))
    return normalized_pixels(square)


def pixels_sha256(image: Image.Image) -> str:
    """SHA-256 of an RGB image's size and pixels: the same for every file that shows the same."""
    return hashlib.sha256(f"{image.width} x {image.height} ".encode() + image.tobytes()).hexdigest()
