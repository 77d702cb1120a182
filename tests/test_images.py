"""Reference images as they come: every kind of file and object a user may hold, each made here."""

from __future__ import annotations

import errno
import io
import os
import struct
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

from blip3o_rt.errors import Blip3oWarning, ImageError
from blip3o_rt.images import (
    MAX_ASPECT_RATIO,
    MAX_SIDE,
    decode_reference,
    load_reference,
    normalized_pixels,
    pixels_sha256,
    reference_pixels,
)
from blip3o_rt.metadata import read_metadata


def corners() -> Image.Image:
    """24 x 16: red top left, green top right, blue bottom left, white bottom right."""
    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[:8, :12] = (255, 0, 0)
    pixels[:8, 12:] = (0, 255, 0)
    pixels[8:, :12] = (0, 0, 255)
    pixels[8:, 12:] = (255, 255, 255)
    return Image.fromarray(pixels)


def values(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    assert type(image) is Image.Image
    return np.asarray(image).astype(int)


def saved(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


@pytest.mark.parametrize(
    "name", ["a.png", "a.bmp", "a.tiff", "a.ppm", "a.gif", "a.tga", "a.jp2", "a.webp", "a.ico"]
)
def test_lossless_files_come_back_as_they_were(tmp_path: Path, name: str) -> None:
    kind = {"a.jp2": "jpg_2000", "a.webp": "webp"}.get(name)
    if kind is not None and not features.check(kind):
        pytest.skip(f"needs Pillow with {kind}")
    options = {"a.webp": {"lossless": True}, "a.ico": {"sizes": [(24, 16)]}}.get(name, {})
    path = saved(corners(), tmp_path / name, **options)
    assert np.array_equal(values(load_reference(path)), values(corners()))
    assert np.array_equal(values(load_reference(str(path))), values(corners()))


def test_the_name_of_a_file_does_not_matter(tmp_path: Path) -> None:
    path = saved(corners(), tmp_path / "image.png").rename(tmp_path / "image.doc")
    assert np.array_equal(values(load_reference(path)), values(corners()))


# What a viewer shows, from what is stored, for each EXIF orientation.
UPRIGHT = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@pytest.mark.parametrize("suffix", ["png", "tiff", "jpg"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_rotation_is_applied(tmp_path: Path, orientation: int, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": 0} if suffix == "jpg" else {}
    path = saved(corners(), tmp_path / f"a.{suffix}", exif=exif, **options)
    method = UPRIGHT[orientation]
    expected = corners() if method is None else corners().transpose(method)

    found = load_reference(path)

    assert found.size == expected.size
    assert np.abs(values(found) - values(expected)).max() <= (4 if suffix == "jpg" else 0)
    assert not found.getexif()
    with Image.open(path) as opened:
        assert np.array_equal(values(load_reference(opened)), values(found))


def test_alpha_is_laid_over_white(tmp_path: Path) -> None:
    image = corners().convert("RGBA")
    alpha = np.full((16, 24), 255, np.uint8)
    alpha[:8, :12], alpha[:8, 12:] = 0, 128
    image.putalpha(Image.fromarray(alpha))

    found = values(load_reference(saved(image, tmp_path / "a.png")))

    assert (found[0, 0] == 255).all()  # transparent red
    assert np.abs(found[0, 20] - (127, 255, 127)).max() <= 1  # green, half there
    assert np.array_equal(found[8:], values(corners())[8:])  # opaque: bit for bit


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "PA"])
def test_every_mode_with_alpha(mode: str) -> None:
    image = Image.new("RGBA", (4, 3), (0, 0, 0, 0))
    image.paste((90, 90, 90, 255), (0, 0, 2, 3))
    converted = image.convert("LA").convert("La") if mode == "La" else image.convert(mode)
    found = values(load_reference(converted))
    assert (found[:, :2] == 90).all()
    assert (found[:, 2:] == 255).all()


@pytest.mark.parametrize(("mode", "transparent"), [("P", 0), ("L", 255), ("RGB", (255, 0, 0))])
def test_a_transparent_color_becomes_white(tmp_path: Path, mode: str, transparent: object) -> None:
    if mode == "P":
        image = Image.new("P", (4, 4), 1)
        image.putpalette([255, 0, 0, 0, 0, 255])
        image.paste(0, (0, 0, 2, 2))
    else:
        image = Image.new(mode, (4, 4), 0)
        image.paste(transparent, (0, 0, 2, 2))  # type: ignore[arg-type]
    path = saved(image, tmp_path / "a.png", transparency=transparent)
    found = values(load_reference(path))
    assert (found[:2, :2] == 255).all()
    assert np.array_equal(found[3, 3], (0, 0, 255) if mode == "P" else (0, 0, 0))


@pytest.mark.parametrize("suffix", ["jpg", "tiff"])
def test_cmyk(tmp_path: Path, suffix: str) -> None:
    """Solid inks: cyan, magenta, yellow, black, none."""
    inks = np.zeros((8, 40, 4), np.uint8)
    for index in range(4):
        inks[:, 8 * index : 8 * index + 8, index] = 255
    options = {"quality": 100, "subsampling": 0} if suffix == "jpg" else {}
    path = saved(Image.frombytes("CMYK", (40, 8), inks.tobytes()), tmp_path / f"a.{suffix}", **options)

    found = values(load_reference(path))[4, 4::8]

    expected = np.array([(0, 255, 255), (255, 0, 255), (255, 255, 0), (0, 0, 0), (255, 255, 255)])
    assert np.abs(found - expected).max() <= 4


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBX", "YCbCr", "HSV"])
def test_other_modes_keep_their_colors(mode: str) -> None:
    gray = Image.new("RGB", (4, 3), (255, 255, 255))
    gray.paste((0, 0, 0), (0, 0, 2, 3))
    found = values(load_reference(gray.convert(mode)))
    assert np.abs(found - values(gray)).max() <= 1


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm", "jp2"])
def test_sixteen_bit_gray_is_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    if suffix == "jp2" and not features.check("jpg_2000"):
        pytest.skip("needs Pillow with jpg_2000")
    samples = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    path = saved(Image.fromarray(samples), tmp_path / f"a.{suffix}")
    assert np.array_equal(values(load_reference(path))[..., 1], samples // 257)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def png(width: int, height: int, depth: int, color: int, rows: bytes) -> bytes:
    """A PNG file of the header given, whatever its rows hold."""
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([depth, color, 0, 0, 0])
    data = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def test_sixteen_bit_color(tmp_path: Path) -> None:
    samples = (np.arange(4 * 5 * 3, dtype=np.uint16).reshape(4, 5, 3) * 1000).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in samples)
    path = tmp_path / "a.png"
    path.write_bytes(png(5, 4, 16, 2, rows))
    assert np.abs(values(load_reference(path)) - samples / 257).max() <= 1


@pytest.mark.parametrize("scale", [1.0, 255.0])
def test_float_gray(tmp_path: Path, scale: float) -> None:
    samples = (np.linspace(0, 1, 12).reshape(3, 4) * scale).astype(np.float32)
    path = saved(Image.fromarray(samples), tmp_path / "a.tiff")
    assert np.array_equal(values(load_reference(path))[..., 0], np.round(samples / scale * 255))


@pytest.mark.parametrize("samples", [[[0.0, np.nan]], [[-1.0, 0.5]], [[0.0, 300.0]]])
def test_floats_that_are_no_image(samples: list[list[float]]) -> None:
    with pytest.raises(ImageError, match=r"floats 0\.\.1"):
        load_reference(Image.fromarray(np.array(samples, np.float32)))


@pytest.mark.parametrize("samples", [[[0, 70_000]], [[-1, 5]]])
def test_integers_beyond_sixteen_bits(samples: list[list[int]]) -> None:
    with pytest.raises(ImageError, match=r"0\.\.65535 is accepted"):
        load_reference(Image.fromarray(np.array(samples, np.int32)))


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tiff"])
def test_animated_images_are_refused_and_a_picked_frame_taken(tmp_path: Path, suffix: str) -> None:
    if suffix == "webp" and not features.check("webp"):
        pytest.skip("needs Pillow with webp")
    frames = [corners(), Image.new("RGB", (24, 16), (0, 0, 255))]
    path = saved(frames[0], tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
    with pytest.raises(ImageError, match=r"has 2 frames and a single still image is accepted.*seek"):
        load_reference(path)
    with Image.open(path) as opened:
        with pytest.raises(ImageError, match="2 frames"):
            load_reference(opened)
        opened.seek(1)
        picked = load_reference(opened.convert("RGB"))
    assert np.abs(values(picked) - values(frames[1])).max() <= 4


def test_a_photograph_with_a_preview_beside_it_is_one_image(tmp_path: Path) -> None:
    photograph, preview = Image.new("RGB", (24, 16), (9, 9, 9)), Image.new("RGB", (24, 16))
    path = saved(photograph, tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[preview])
    with Image.open(path) as opened:
        assert opened.n_frames == 2  # type: ignore[attr-defined]
    assert np.abs(values(load_reference(path)) - 9).max() <= 1


@pytest.mark.parametrize("suffix", ["png", "jpg", "tiff", "bmp", "gif"])
def test_truncated_files(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    path = saved(Image.fromarray(noise), tmp_path / f"a.{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ImageError, match=r"a\.\w+' (is damaged or cut short|cannot be decoded)"):
        load_reference(path)


def test_corrupt_pixels(tmp_path: Path) -> None:
    content = bytearray(saved(corners(), tmp_path / "a.png").read_bytes())
    start = content.index(b"IDAT") + 6
    content[start : start + 20] = bytes(20)
    path = tmp_path / "b.png"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=r"is damaged or cut short|cannot be decoded"):
        load_reference(path)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    name=st.sampled_from(["a.png", "a.jpg", "a.tiff", "a.bmp", "a.gif", "a.ppm", "a.tga", "a.ico"]),
    changes=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4
    ),
    in_header=st.booleans(),
)
def test_damaged_bytes_never_raise_anything_else(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    changes: list[tuple[float, int]],
    in_header: bool,
) -> None:
    """An image or an ImageError of one line, whichever bytes are wrong."""
    path = tmp_path_factory.mktemp("damaged") / name
    content = bytearray(saved(corners(), path).read_bytes())
    reach = min(len(content), 64) if in_header else len(content)
    for place, value in changes:
        content[int(place * reach)] = value
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's, of damaged metadata
        try:
            outcome = load_reference(path).mode
        except ImageError as error:
            outcome = str(error)
    assert outcome == "RGB" or (name in outcome and "\n" not in outcome)


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"<svg/>", b"\x89PNG\r\n\x1a\n", b"%PDF-1.4", b"%!PS-Adobe"]
)
def test_files_that_are_no_images(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=r"is not an image: PNG, JPEG, .* are accepted"):
        load_reference(path)


def test_a_page_description_is_never_run(tmp_path: Path) -> None:
    """PIL would hand it to an interpreter; it is refused by its kind."""
    path = saved(corners(), tmp_path / "a.eps")
    with pytest.raises(ImageError, match="is not an image"):
        load_reference(path)


@pytest.mark.parametrize(
    ("width", "height"), [(20_000, 3000), (3000, 20_000), (12_000, 12_000), (60_000, 60_000), (2000, 50)]
)
def test_sizes_beyond_the_limits_are_refused_before_decoding(tmp_path: Path, width: int, height: int) -> None:
    """The file has no pixels at all: reading any would fail with another message."""
    path = tmp_path / "a.png"
    path.write_bytes(png(width, height, 8, 2, b""))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError) as caught:
            load_reference(path)
    assert "images up to 16384 pixels a side, 67108864 pixels in all and 32 times" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_real_image_20000_pixels_wide(tmp_path: Path) -> None:
    path = saved(Image.new("L", (20_000, 1000)), tmp_path / "a.png")
    with pytest.raises(ImageError, match="is 20000 x 1000 pixels: images up to 16384"):
        load_reference(path)


@pytest.mark.parametrize("size", [(1, 1), (1, MAX_ASPECT_RATIO), (MAX_ASPECT_RATIO, 1)])
def test_the_smallest_images_are_accepted(tmp_path: Path, size: tuple[int, int]) -> None:
    path = saved(Image.new("RGB", size, (10, 20, 30)), tmp_path / "a.png")
    found = load_reference(path)
    assert found.size == size
    pixels = reference_pixels(found, 64)
    expected = torch.tensor([10.0, 20.0, 30.0])[:, None, None] / 255 * 2 - 1
    assert torch.allclose(pixels[0], expected.expand(3, 64, 64), atol=1e-6)


def test_the_largest_side_is_accepted(tmp_path: Path) -> None:
    path = saved(Image.new("L", (MAX_SIDE, MAX_SIDE // MAX_ASPECT_RATIO), 9), tmp_path / "a.png")
    found = load_reference(path)
    assert found.size == (MAX_SIDE, 512)
    assert found.getpixel((MAX_SIDE - 1, 511)) == (9, 9, 9)


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"missing\.png' does not exist"):
        load_reference(tmp_path / "missing.png")
    with pytest.raises(ImageError, match="is not a file"):
        load_reference(tmp_path)
    with pytest.raises(ImageError, match="cannot be read: File name too long"):
        load_reference(tmp_path / ("a" * 300))
    with pytest.raises(ImageError, match=r"cannot be decoded|does not exist"):
        load_reference("a\0b.png")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ImageError, match="is not a file"):
        load_reference(tmp_path / "pipe")


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the system says it; set up by hand, since permissions do not bind every user who runs tests."""

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    path = saved(corners(), tmp_path / "a.png")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ImageError, match="cannot be read: Permission denied"):
        load_reference(path)


def test_no_file_stays_open(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    good = saved(noise, tmp_path / "good.png")
    animated = saved(noise, tmp_path / "animated.gif", save_all=True, append_images=[corners()])
    truncated = tmp_path / "truncated.png"
    truncated.write_bytes(good.read_bytes()[:5000])
    text = tmp_path / "text.png"
    text.write_text("hello")
    large = tmp_path / "large.png"
    large.write_bytes(png(20_000, 3000, 8, 2, b""))
    process = psutil.Process()
    files_before = process.open_files()

    load_reference(good)
    for path in (animated, truncated, text, large):
        with pytest.raises(ImageError) as caught:
            load_reference(path)
        assert process.open_files() == files_before, f"after: {caught.value}"


@pytest.mark.parametrize("thing", [None, 3, b"bytes", [1, 2], io.BytesIO()])
def test_things_that_are_no_images(thing: object) -> None:
    with pytest.raises(ImageError, match="must be a path, a PIL image, an array or a tensor, not"):
        load_reference(thing)  # type: ignore[arg-type]


def test_a_closed_image(tmp_path: Path) -> None:
    with Image.open(saved(corners(), tmp_path / "a.png")) as image:
        pass
    with pytest.raises(ImageError, match="cannot be decoded"):
        load_reference(image)


def test_the_argument_is_left_as_it_was() -> None:
    image = corners()
    image.info["note"] = "mine"
    found = load_reference(image)
    found.paste((1, 2, 3), (0, 0, 24, 16))
    assert np.array_equal(values(image), values(corners()))
    assert image.info == {"note": "mine"}
    assert found.info == {}


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64, np.float16])
@pytest.mark.parametrize("channels", [(), (1,), (3,), (4,)])
def test_arrays(dtype: type, channels: tuple[int, ...]) -> None:
    levels = np.arange(4 * 5).reshape(4, 5) * 13
    scale = {np.uint8: 1, np.uint16: 257}.get(dtype, 1 / 255)
    array = np.broadcast_to(
        (levels * scale).astype(dtype).reshape(4, 5, *(1 for _ in channels)), (4, 5, *channels)
    )
    if channels == (4,):
        array = np.concatenate([array[..., :3], np.full((4, 5, 1), round(255 * scale), dtype)], axis=-1)
    assert np.array_equal(values(load_reference(array)), np.repeat(levels[..., None], 3, -1))


def test_a_boolean_array_is_black_and_white() -> None:
    array = np.eye(3, dtype=bool)
    assert np.array_equal(values(load_reference(array))[..., 0], np.eye(3) * 255)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("batched", [True, False])
def test_tensors(dtype: torch.dtype, batched: bool) -> None:
    levels = torch.tensor([0, 255, 0, 255, 0, 255]).reshape(1, 2, 3).repeat(3, 1, 1)
    tensor = levels.to(dtype) if dtype == torch.uint8 else (levels / 255).to(dtype).requires_grad_()
    found = values(load_reference(tensor[None] if batched else tensor))
    assert np.array_equal(found, levels.permute(1, 2, 0).numpy())


@pytest.mark.parametrize(
    ("thing", "words"),
    [
        (np.zeros((4, 4, 2), np.uint8), r"\[H, W\] or \[H, W, 1, 3 or 4\], not \[4, 4, 2\]"),
        (np.zeros(4, np.uint8), r"not \[4\]"),
        (np.zeros((0, 4, 3), np.uint8), "has no pixels"),
        (np.zeros((1, 17_000), np.uint8), "17000 x 1 pixels"),
        (np.full((2, 2), 7), "int64 samples from 7 to 7"),
        (np.full((2, 2), 7.0), r"float64 samples from 7\.0 to 7\.0"),
        (np.full((2, 2), "a"), "<U1 samples: uint8, uint16 and floats"),
        (torch.zeros(2, 3, 4, 4), r"\[3, H, W\] or \[1, 3, H, W\], not \[2, 3, 4, 4\]"),
        (torch.zeros(4, 4, 3), r"not \[4, 4, 3\]"),
        (torch.zeros(4), r"not \[4\]"),
        (torch.full((3, 2, 2), 2.0), "float32 samples from 2.0 to 2.0"),
    ],
)
def test_arrays_and_tensors_that_are_no_images(thing: np.ndarray | torch.Tensor, words: str) -> None:
    with pytest.raises(ImageError, match=words):
        load_reference(thing)


def test_normalized_pixels() -> None:
    pixels = normalized_pixels(corners())
    assert pixels.shape == (1, 3, 16, 24)
    assert pixels[0, :, 0, 0].tolist() == [1.0, -1.0, -1.0]
    assert pixels[0, :, 15, 0].tolist() == [-1.0, -1.0, 1.0]


# What a good image may carry or hide: every case with the pixel that a viewer shows.


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def with_chunks(image: Image.Image, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of the image with chunks before its pixels."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    content = buffer.getvalue()
    return content[:33] + b"".join(png_chunk(*chunk) for chunk in chunks) + content[33:]


def matrix_profile(colorants: dict[bytes, tuple[float, float, float]], padding: int = 0) -> bytes:
    """An ICC profile of three colorants (XYZ at D50) with the curve of sRGB, and as much text as asked."""
    numbers = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    curve = struct.pack(">4sIHH5i", b"para", 0, 3, 0, *(round(65536 * number) for number in numbers))
    fixed = {
        name: struct.pack(">4sI3i", b"XYZ ", 0, *(round(value * 65536) for value in values))
        for name, values in {b"wtpt": (0.9642, 1.0, 0.8249), **colorants}.items()
    }
    text = b"a" * max(padding, 4)
    tags = fixed | {
        b"rTRC": curve,
        b"gTRC": curve,
        b"bTRC": curve,
        b"desc": struct.pack(">4sII", b"desc", 0, 2) + b"x\0" + bytes(79),
        b"cprt": struct.pack(">4sI", b"text", 0) + text + b"\0",
    }
    table, body, offset = b"", b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += struct.pack(">4sII", name, offset + len(body), len(data))
        body += data
    size = offset + len(body)
    head = struct.pack(">I4sI4s4s4s", size, b"\0\0\0\0", 0x02400000, b"mntr", b"RGB ", b"XYZ ")
    head += struct.pack(">6H4s", 2024, 1, 1, 0, 0, 0, b"acsp") + bytes(28)
    head += struct.pack(">3i", 63190, 65536, 54061)
    return head + bytes(128 - len(head)) + struct.pack(">I", len(tags)) + table + body


# XYZ of the primaries, adapted to D50, as color.org and Apple publish them.
SRGB = {
    b"rXYZ": (0.4361, 0.2225, 0.0139),
    b"gXYZ": (0.3851, 0.7169, 0.0971),
    b"bXYZ": (0.1431, 0.0606, 0.7141),
}
DISPLAY_P3 = {
    b"rXYZ": (0.5151, 0.2412, -0.0011),
    b"gXYZ": (0.2920, 0.6922, 0.0419),
    b"bXYZ": (0.1571, 0.0666, 0.7841),
}


@pytest.mark.parametrize("suffix", ["png", "jpg", "tiff", "webp"])
def test_display_p3_becomes_srgb(tmp_path: Path, suffix: str) -> None:
    """Expected by the definition: to linear light, by way of XYZ to linear sRGB, and to its curve."""
    options: dict[str, object] = {"lossless": True} if suffix == "webp" else {}
    if suffix == "jpg":
        options = {"quality": 100, "subsampling": 0}
    photo = Image.new("RGB", (16, 16), (200, 100, 50))
    path = saved(photo, tmp_path / f"a.{suffix}", icc_profile=matrix_profile(DISPLAY_P3), **options)
    linear = ((np.array((200, 100, 50)) / 255 + 0.055) / 1.055) ** 2.4
    to_xyz = np.array(list(DISPLAY_P3.values())).T
    srgb = np.linalg.inv(np.array(list(SRGB.values())).T) @ to_xyz @ linear
    expected = 255 * (1.055 * srgb ** (1 / 2.4) - 0.055)
    assert np.abs(values(load_reference(path))[0, 0] - expected).max() <= 2  # 8 bits, and the JPEG's own
    assert np.abs(expected - (200, 100, 50)).max() > 8


def test_a_profile_of_srgb_leaves_the_bits(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    path = saved(noise, tmp_path / "a.png", icc_profile=matrix_profile(SRGB))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(values(load_reference(path)), values(noise))


def test_a_profile_with_alpha_and_orientation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = Image.new("RGBA", (4, 2), (200, 100, 50, 0))
    photo.paste((200, 100, 50, 255), (0, 0, 2, 2))
    profile = matrix_profile(DISPLAY_P3)
    found = load_reference(saved(photo, tmp_path / "a.png", icc_profile=profile, exif=exif))
    assert found.size == (2, 4)
    assert found.getpixel((0, 3)) == (255, 255, 255)
    red, _, blue = found.getpixel((0, 0))  # type: ignore[misc]
    assert (red > 208, blue < 40) == (True, True)


@pytest.mark.parametrize("profile", [b"nonsense", matrix_profile(DISPLAY_P3)[:200], b""])
def test_a_broken_profile_is_ignored_with_a_note(tmp_path: Path, profile: bytes) -> None:
    path = write(tmp_path / "a.png", with_chunks(corners(), (b"iCCP", b"x\0\0" + zlib.compress(profile))))
    with pytest.warns(Blip3oWarning, match=r"a\.png': its color profile cannot be used .* is ignored$"):
        assert np.array_equal(values(load_reference(path)), values(corners()))


@pytest.mark.parametrize(
    "chunk",
    [
        (b"zTXt", b"k\0\0" + zlib.compress(b"y" * 2_000_000)),
        (b"tEXt", b"k\0" + b"y" * 2_000_000),
        (b"iTXt", b"k\0\1\0\0\0" + zlib.compress(b"y" * 2_000_000)),
        (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(b"y" * 200_000_000)),
        (b"zTXt", b"k\0\0 not zlib at all"),
        (b"pHYs", b"short"),
        (b"gAMA", b""),
        (b"eXIf", b"MM\0*broken"),
    ],
)
def test_metadata_that_is_not_needed_refuses_no_image(tmp_path: Path, chunk: tuple[bytes, bytes]) -> None:
    path = write(tmp_path / "a.png", with_chunks(corners(), chunk))
    assert np.array_equal(values(load_reference(path)), values(corners()))


def test_a_profile_of_three_megabytes(tmp_path: Path) -> None:
    profile = matrix_profile(SRGB, padding=3_000_000)
    chunk = (b"iCCP", b"x\0\0" + zlib.compress(profile))
    path = write(tmp_path / "a.png", with_chunks(corners(), chunk))
    assert np.array_equal(values(load_reference(path)), values(corners()))


def test_a_profile_that_is_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    chunk = (b"iCCP", b"x\0\0" + zlib.compress(bytes(400_000_000), 9))
    path = write(tmp_path / "a.png", with_chunks(corners(), chunk))
    with pytest.warns(Blip3oWarning, match="color profile"):
        assert np.array_equal(values(load_reference(path)), values(corners()))


def test_a_limit_that_the_program_gave_pil_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(corners(), tmp_path / "a.tiff")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ImageError, match=r"too large: this program set PIL's Image\.MAX_IMAGE_PIXELS to 10$"):
        load_reference(path)


def test_pixels_that_are_a_bomb_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.png", png(60_000, 60_000, 8, 2, b""))
    with pytest.raises(ImageError, match="60000 x 60000 pixels"):
        load_reference(path)


@pytest.mark.parametrize(
    ("depth", "color", "pixels", "key", "expected"),
    [
        (16, 0, b"\0\0\x80\x80", b"\0\0", [255, 128]),
        (16, 0, b"\x12\x34\x12\x35", b"\x12\x34", [255, 18]),
        (16, 2, b"\x12\x34" * 3 + b"\x12\x35" * 3, b"\x12\x34" * 3, [255, 18]),
        (16, 2, b"\0\5" * 3 + b"\0\6" * 3, b"\0\5" * 3, [255, 0]),
        (16, 2, b"\5\0" * 3 + b"\0\5" * 3, b"\0\5" * 3, [5, 255]),
        (4, 0, b"\x36", b"\0\3", [255, 102]),
        (2, 0, b"\x90", b"\0\2", [255, 85]),
        (1, 0, b"\x40", b"\0\0", [255, 255]),
        (1, 0, b"\x00", b"\0\1", [0, 0]),
        (8, 0, b"\x07\x09", b"\0\7", [255, 9]),
    ],
)
def test_a_transparent_value_of_every_depth(
    tmp_path: Path, depth: int, color: int, pixels: bytes, key: bytes, expected: list[int]
) -> None:
    content = png(2, 1, depth, color, b"\0" + pixels)
    path = write(tmp_path / "a.png", content[:33] + png_chunk(b"tRNS", key) + content[33:])
    assert values(load_reference(path))[0, :, 0].tolist() == expected


def test_a_palette_that_holds_alpha() -> None:
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    half.paste((0, 0, 255, 255), (2, 2, 4, 4))
    found = values(load_reference(half.quantize()))
    assert found[0, 0].tolist() == [255, 255, 255]
    assert found[3, 3].tolist() == [0, 0, 255]


def tga(kind: int, depth: int, attributes: int, body: bytes, colors: int = 0) -> bytes:
    """A TGA of 2 x 1 pixels, the first row on top; with a color map of 32 bits where it has colors."""
    map_depth = 32 if colors else 0
    head = struct.pack("<BBBHHB", 0, colors > 0, kind, 0, colors, map_depth)
    return head + struct.pack("<HHHHBB", 0, 0, 2, 1, depth, 0x20 | attributes) + body


RED_BGR, BLUE_BGR = b"\0\0\xff", b"\xff\0\0"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (tga(2, 32, 0, RED_BGR + b"\0" + BLUE_BGR + b"\0"), [(255, 0, 0), (0, 0, 255)]),
        (tga(2, 32, 8, RED_BGR + b"\0" + BLUE_BGR + b"\0"), [(255, 255, 255), (255, 255, 255)]),
        (tga(2, 32, 8, RED_BGR + b"\0" + BLUE_BGR + b"\xff"), [(255, 255, 255), (0, 0, 255)]),
        (tga(1, 8, 8, RED_BGR + b"\0" + BLUE_BGR + b"\xff" + b"\0\1", 2), [(255, 255, 255), (0, 0, 255)]),
        (tga(1, 8, 0, RED_BGR + b"\0" + BLUE_BGR + b"\0" + b"\0\1", 2), [(255, 0, 0), (0, 0, 255)]),
        (tga(2, 16, 1, struct.pack("<2H", 0xFC00, 0x801F) + bytes(9)), [(255, 0, 0), (0, 0, 255)]),
        (tga(2, 16, 0, struct.pack("<2H", 0x7C00, 0x001F) + bytes(9)), [(255, 0, 0), (0, 0, 255)]),
    ],
)
def test_alpha_of_a_tga(tmp_path: Path, content: bytes, expected: list[tuple[int, int, int]]) -> None:
    """Alpha counts where the header says there is some, and where it is not zero throughout."""
    found = load_reference(write(tmp_path / "a.tga", content))
    assert [found.getpixel((x, 0)) for x in (0, 1)] == expected


def test_a_bitmap_whose_fourth_byte_is_zero_is_opaque(tmp_path: Path) -> None:
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    info = struct.pack("<IiiHHIIiiII", 108, 2, 1, 1, 32, 3, 8, 0, 0, 0, 0) + masks + bytes(52)
    body = RED_BGR + b"\0" + BLUE_BGR + b"\0"
    head = struct.pack("<2sIHHI", b"BM", 14 + 108 + 8, 0, 0, 14 + 108)
    found = load_reference(write(tmp_path / "a.bmp", head + info + body))
    assert [found.getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 0), (0, 0, 255)]


def gray_tiff(
    bits: int, photometric: int, data: bytes, sample_format: int = 1, *more: tuple[int, int]
) -> bytes:
    """An uncompressed gray TIFF of 2 x 1 pixels; photometric 0 is white-is-zero, 1 black-is-zero."""
    tags = [(256, 2), (257, 1), (258, bits), (259, 1), (262, photometric), (277, 1), (278, 1)]
    tags += [(279, len(data)), (339, sample_format), *more]
    tags = sorted([*tags, (273, 8 + 2 + 12 * (len(tags) + 1) + 4)])
    entries = b"".join(struct.pack("<HHII", tag, 3, 1, value) for tag, value in tags)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + b"\0\0\0\0" + data


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (gray_tiff(12, 1, b"\xff\xf8\x00"), [255, 128]),
        (gray_tiff(16, 0, struct.pack("<2H", 0, 65535)), [255, 0]),
        (gray_tiff(16, 1, struct.pack("<2H", 0, 65535)), [0, 255]),
        (gray_tiff(8, 0, b"\0\xff"), [255, 0]),
        (gray_tiff(32, 0, struct.pack("<2f", 0.0, 1.0), 3), [255, 0]),
    ],
)
def test_depths_and_polarities_of_a_tiff(tmp_path: Path, content: bytes, expected: list[int]) -> None:
    assert values(load_reference(write(tmp_path / "a.tif", content)))[0, :, 0].tolist() == expected


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (gray_tiff(10, 1, b"\xff\xff\xff"), r"not read \(TIFF, .*\): save it with 8 or 16 bits"),
        (gray_tiff(32, 1, struct.pack("<2I", 0, 200)), r"from 0 to 200, of 0\.\.255 or of 0\.\.65535"),
        (gray_tiff(32, 1, struct.pack("<2f", 0, 1.2), 3), r"float samples from 0\.0 to 1\.2"),
        (gray_tiff(16, 1, struct.pack("<2h", 0, 32767), 2), "signed samples, whose white is not known"),
        (gray_tiff(8, 1, b"\0\x7f", 2), "signed samples, whose white is not known"),
    ],
)
def test_samples_that_may_mean_two_things_are_refused(tmp_path: Path, content: bytes, words: str) -> None:
    with pytest.raises(ImageError, match=words):
        load_reference(write(tmp_path / "a.tif", content))


@pytest.mark.parametrize("image", [Image.new("L", (4, 4), 200).convert("I"), Image.new("F", (4, 4), 1.2)])
def test_an_image_in_memory_that_may_mean_two_things_is_refused(image: Image.Image) -> None:
    with pytest.raises(ImageError, match="samples from"):
        load_reference(image)


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC"),
        (b"\xff\x0a\0\0", "JPEG XL"),
        (b"8BPS\0\1", "Photoshop"),
        (b"v/1\x01\2\0\0\0", "OpenEXR"),
        (b"qoif\0\0\0\1", "QOI"),
        (b"P7\nWIDTH 1\n", "PAM"),
        (b"II*\0\x10\0\0\0CR\2\0", "camera raw"),
        (gray_tiff(8, 1, b"\0\xff", 1, (254, 1)), "camera raw"),
        (gray_tiff(8, 1, b"\0\xff", 1, (50706, 1)), "camera raw"),
        (bytes(128) + b"DICM", "DICOM"),
    ],
)
def test_a_format_that_is_not_read_is_named(tmp_path: Path, head: bytes, kind: str) -> None:
    with pytest.raises(ImageError, match=f"is in a format that is not read: {kind}; convert it to PNG"):
        load_reference(write(tmp_path / "photo.png", head + bytes(64)))


@pytest.mark.parametrize(
    ("head", "kind"),
    [(b"<!DOCTYPE html><html>", "a web page"), (b"%PDF-1.7", "a PDF"), (b"\0\0\0\x18ftypisom", "a video")],
)
def test_what_is_no_image_is_named(tmp_path: Path, head: bytes, kind: str) -> None:
    with pytest.raises(ImageError, match=f"is not an image: PNG, .* are accepted and this is {kind}$"):
        load_reference(write(tmp_path / "photo.png", head + bytes(64)))


@pytest.mark.parametrize("url", ["https://example.org/a.png", "HTTP://example.org/a.png", "s3://b/a.png"])
@pytest.mark.parametrize("kind", [str, Path])
def test_nothing_is_fetched(url: str, kind: type) -> None:
    with pytest.raises(ImageError, match="is a URL and nothing is fetched: download it"):
        load_reference(kind(url))


def test_a_data_uri_is_not_echoed() -> None:
    with pytest.raises(ImageError, match="is a data URI, which is not decoded") as caught:
        load_reference("data:image/png;base64," + "A" * 100_000)
    assert len(str(caught.value)) < 150


def test_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    saved(corners(), tmp_path / "a.png")
    assert np.array_equal(values(load_reference("~/a.png")), values(corners()))


class NoPath:
    """What claims to be a path and is none."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __fspath__(self) -> object:
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


@pytest.mark.parametrize("reader", [load_reference, read_metadata])
@pytest.mark.parametrize(
    "thing",
    [NoPath(3), NoPath(b"a.png"), NoPath(ValueError("two\nlines")), "a\nb", "a\0b", "x" * 10**6],
)
def test_what_is_no_path_is_refused_in_one_line(reader: Callable[[object], object], thing: object) -> None:
    with pytest.raises(ImageError) as caught:
        reader(thing)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


BROKEN_EXIF = b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\1\3\0\xff\xff\0\0\6\0"


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("action", ["always", "error"])
def test_damaged_metadata_is_no_warning_of_the_program(tmp_path: Path, suffix: str, action: str) -> None:
    """PIL warns of it, which the program would print, or raise where it makes errors of warnings."""
    options = {"exif": BROKEN_EXIF} if suffix != "tiff" else {"tiffinfo": {700: b"x" * 40, 33723: b"y" * 90}}
    path = saved(corners(), tmp_path / f"a.{suffix}", **options)
    if suffix == "tiff":
        content = path.read_bytes()
        private = struct.pack("<HH", 33723, 7)
        path.write_bytes(content.replace(private + struct.pack("<I", 90), private + struct.pack("<I", 9**9)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opened = Image.open(path)
    with opened, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter(action)  # type: ignore[arg-type]
        assert load_reference(path).size == (24, 16)
        assert load_reference(opened).size == (24, 16)
        with pytest.raises(ImageError):
            read_metadata(path if suffix != "png" else tmp_path)
    assert caught == []


def test_a_note_of_ours_is_given_once_and_in_every_thread(tmp_path: Path) -> None:
    path = write(tmp_path / "a.png", with_chunks(corners(), (b"iCCP", b"x\0\0" + zlib.compress(b"no"))))
    before = list(warnings.filters)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with ThreadPoolExecutor(4) as executor:
            list(executor.map(lambda _: load_reference(path), range(40)))
    assert [warning.category for warning in caught] == [Blip3oWarning] * 40
    assert warnings.filters == before


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tiff", "a.gif", "a.tga", "a.ico"])
def test_the_bytes_of_a_file_are_read_as_the_file_is(tmp_path: Path, name: str) -> None:
    options = {"a.ico": {"sizes": [(24, 16)]}}.get(name, {})
    data = saved(corners(), tmp_path / name, **options).read_bytes()
    assert np.array_equal(values(decode_reference(data, "the upload")), values(corners()))
    assert np.array_equal(values(decode_reference(data, "the upload", 24 * 16)), values(corners()))
    with pytest.raises(ImageError, match=r"^the upload is 24 x 16 pixels: at most 383 pixels are accepted$"):
        decode_reference(data, "the upload", 24 * 16 - 1)
    with pytest.raises(ImageError, match=r"^the upload "):
        decode_reference(data[: len(data) // 2], "the upload")


def test_a_gray_profile_of_a_black_and_white_image_is_used(tmp_path: Path) -> None:
    profile = matrix_profile(SRGB).replace(b"mntrRGB ", b"mntrGRAY").replace(b"rTRC", b"kTRC")
    image = Image.new("1", (2, 2), 1)
    image.putpixel((0, 0), 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = values(load_reference(saved(image, tmp_path / "a.png", icc_profile=profile)))
    assert np.abs(found[..., 0] - [[0, 255], [255, 255]]).max() <= 1


def test_a_hash_is_of_what_is_seen(tmp_path: Path) -> None:
    one, other = saved(corners(), tmp_path / "a.png"), saved(corners(), tmp_path / "a.bmp")
    assert pixels_sha256(load_reference(one)) == pixels_sha256(load_reference(other))
    turned = corners().transpose(Image.Transpose.ROTATE_90)
    assert pixels_sha256(load_reference(turned)) != pixels_sha256(load_reference(one))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(3, 2, 2).to_sparse(),
        torch.zeros(3, 2, 2, device="meta"),
        torch.quantize_per_tensor(torch.zeros(3, 2, 2), 0.1, 0, torch.quint8),
    ],
)
def test_tensors_that_do_not_hold_their_values(tensor: torch.Tensor) -> None:
    with pytest.raises(ImageError, match="sparse, meta and quantized ones do not"):
        load_reference(tensor)
