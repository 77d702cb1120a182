"""Reference pictures at the door: every kind of file and object a user may hold, each made here."""

from __future__ import annotations

import errno
import io
import os
import warnings
import zlib
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

from blip3o_rt.errors import ImageError
from blip3o_rt.images import MAX_ASPECT_RATIO, MAX_SIDE, load_reference, normalised_pixels
from blip3o_rt.vae.pixels import reference_pixels


def corners() -> Image.Image:
    """24 x 16: red top left, green top right, blue bottom left, white bottom right."""
    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[:8, :12] = (255, 0, 0)
    pixels[:8, 12:] = (0, 255, 0)
    pixels[8:, :12] = (0, 0, 255)
    pixels[8:, 12:] = (255, 255, 255)
    return Image.fromarray(pixels)


def values(picture: Image.Image) -> np.ndarray:
    assert picture.mode == "RGB"
    assert type(picture) is Image.Image
    return np.asarray(picture).astype(int)


def saved(picture: Image.Image, path: Path, **options: object) -> Path:
    picture.save(path, **options)
    return path


@pytest.mark.parametrize(
    "name", ["a.png", "a.bmp", "a.tiff", "a.ppm", "a.gif", "a.tga", "a.jp2", "a.webp", "a.ico"]
)
def test_lossless_files_come_back_as_they_were(tmp_path: Path, name: str) -> None:
    kind = {"a.jp2": "jpg_2000", "a.webp": "webp"}.get(name)
    if kind is not None and not features.check(kind):
        pytest.skip(f"needs Pillow with {kind}")
    options: dict[str, object] = {"a.webp": {"lossless": True}, "a.ico": {"sizes": [(24, 16)]}}.get(name, {})
    path = saved(corners(), tmp_path / name, **options)
    assert np.array_equal(values(load_reference(path)), values(corners()))
    assert np.array_equal(values(load_reference(str(path))), values(corners()))


def test_the_name_of_a_file_does_not_matter(tmp_path: Path) -> None:
    path = saved(corners(), tmp_path / "picture.png").rename(tmp_path / "picture.doc")
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
    picture = corners().convert("RGBA")
    alpha = np.full((16, 24), 255, np.uint8)
    alpha[:8, :12], alpha[:8, 12:] = 0, 128
    picture.putalpha(Image.fromarray(alpha))

    found = values(load_reference(saved(picture, tmp_path / "a.png")))

    assert (found[0, 0] == 255).all()  # transparent red
    assert np.abs(found[0, 20] - (127, 255, 127)).max() <= 1  # green, half there
    assert np.array_equal(found[8:], values(corners())[8:])  # opaque: bit for bit


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "PA"])
def test_every_mode_with_alpha(mode: str) -> None:
    picture = Image.new("RGBA", (4, 3), (0, 0, 0, 0))
    picture.paste((90, 90, 90, 255), (0, 0, 2, 3))
    converted = picture.convert("LA").convert("La") if mode == "La" else picture.convert(mode)
    found = values(load_reference(converted))
    assert (found[:, :2] == 90).all()
    assert (found[:, 2:] == 255).all()


@pytest.mark.parametrize(("mode", "transparent"), [("P", 0), ("L", 255), ("RGB", (255, 0, 0))])
def test_a_transparent_colour_becomes_white(tmp_path: Path, mode: str, transparent: object) -> None:
    if mode == "P":
        picture = Image.new("P", (4, 4), 1)
        picture.putpalette([255, 0, 0, 0, 0, 255])
        picture.paste(0, (0, 0, 2, 2))
    else:
        picture = Image.new(mode, (4, 4), 0)
        picture.paste(transparent, (0, 0, 2, 2))  # type: ignore[arg-type]
    path = saved(picture, tmp_path / "a.png", transparency=transparent)
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
def test_other_modes_keep_their_colours(mode: str) -> None:
    grey = Image.new("RGB", (4, 3), (255, 255, 255))
    grey.paste((0, 0, 0), (0, 0, 2, 3))
    found = values(load_reference(grey.convert(mode)))
    assert np.abs(found - values(grey)).max() <= 1


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm", "jp2"])
def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    if suffix == "jp2" and not features.check("jpg_2000"):
        pytest.skip("needs Pillow with jpg_2000")
    samples = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    path = saved(Image.fromarray(samples), tmp_path / f"a.{suffix}")
    assert np.array_equal(values(load_reference(path))[..., 1], samples // 257)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG file of the header given, whatever its rows hold."""
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([depth, colour, 0, 0, 0])
    data = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def test_sixteen_bit_colour(tmp_path: Path) -> None:
    samples = (np.arange(4 * 5 * 3, dtype=np.uint16).reshape(4, 5, 3) * 1000).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in samples)
    path = tmp_path / "a.png"
    path.write_bytes(png(5, 4, 16, 2, rows))
    assert np.abs(values(load_reference(path)) - samples / 257).max() <= 1


@pytest.mark.parametrize("scale", [1.0, 255.0])
def test_float_grey(tmp_path: Path, scale: float) -> None:
    samples = (np.linspace(0, 1, 12).reshape(3, 4) * scale).astype(np.float32)
    path = saved(Image.fromarray(samples), tmp_path / "a.tiff")
    assert np.array_equal(values(load_reference(path))[..., 0], np.round(samples / scale * 255))


@pytest.mark.parametrize("samples", [[[0.0, np.nan]], [[-1.0, 0.5]], [[0.0, 300.0]]])
def test_floats_that_are_no_picture(samples: list[list[float]]) -> None:
    with pytest.raises(ImageError, match=r"floats 0\.\.1"):
        load_reference(Image.fromarray(np.array(samples, np.float32)))


@pytest.mark.parametrize("samples", [[[0, 70_000]], [[-1, 5]]])
def test_integers_beyond_sixteen_bits(samples: list[list[int]]) -> None:
    with pytest.raises(ImageError, match=r"0\.\.65535 is accepted"):
        load_reference(Image.fromarray(np.array(samples, np.int32)))


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tiff"])
def test_animated_pictures_are_refused_and_a_picked_frame_taken(tmp_path: Path, suffix: str) -> None:
    if suffix == "webp" and not features.check("webp"):
        pytest.skip("needs Pillow with webp")
    frames = [corners(), Image.new("RGB", (24, 16), (0, 0, 255))]
    path = saved(frames[0], tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
    with pytest.raises(ImageError, match=r"has 2 frames and a single still picture is accepted.*seek"):
        load_reference(path)
    with Image.open(path) as opened:
        with pytest.raises(ImageError, match="2 frames"):
            load_reference(opened)
        opened.seek(1)
        picked = load_reference(opened.convert("RGB"))
    assert np.abs(values(picked) - values(frames[1])).max() <= 4


def test_a_photograph_with_a_preview_beside_it_is_one_picture(tmp_path: Path) -> None:
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
    """A picture or an ImageError of one line, whichever bytes are wrong."""
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
def test_files_that_are_no_pictures(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=r"is not a picture: PNG, JPEG, .* are accepted"):
        load_reference(path)


def test_a_page_description_is_never_run(tmp_path: Path) -> None:
    """PIL would hand it to an interpreter; it is refused by its kind."""
    path = saved(corners(), tmp_path / "a.eps")
    with pytest.raises(ImageError, match="is not a picture"):
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
    assert "pictures up to 16384 pixels a side, 67108864 pixels in all and 32 times" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_real_picture_20000_pixels_wide(tmp_path: Path) -> None:
    path = saved(Image.new("L", (20_000, 1000)), tmp_path / "a.png")
    with pytest.raises(ImageError, match="is 20000 x 1000 pixels: pictures up to 16384"):
        load_reference(path)


@pytest.mark.parametrize("size", [(1, 1), (1, MAX_ASPECT_RATIO), (MAX_ASPECT_RATIO, 1)])
def test_the_smallest_pictures_are_accepted(tmp_path: Path, size: tuple[int, int]) -> None:
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
def test_things_that_are_no_pictures(thing: object) -> None:
    with pytest.raises(ImageError, match="must be a path, a PIL picture, an array or a tensor, not"):
        load_reference(thing)  # type: ignore[arg-type]


def test_a_closed_picture(tmp_path: Path) -> None:
    with Image.open(saved(corners(), tmp_path / "a.png")) as picture:
        pass
    with pytest.raises(ImageError, match="cannot be decoded"):
        load_reference(picture)


def test_the_argument_is_left_as_it_was() -> None:
    picture = corners()
    picture.info["note"] = "mine"
    found = load_reference(picture)
    found.paste((1, 2, 3), (0, 0, 24, 16))
    assert np.array_equal(values(picture), values(corners()))
    assert picture.info == {"note": "mine"}
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
def test_arrays_and_tensors_that_are_no_pictures(thing: np.ndarray | torch.Tensor, words: str) -> None:
    with pytest.raises(ImageError, match=words):
        load_reference(thing)


def test_normalised_pixels() -> None:
    pixels = normalised_pixels(corners())
    assert pixels.shape == (1, 3, 16, 24)
    assert pixels[0, :, 0, 0].tolist() == [1.0, -1.0, -1.0]
    assert pixels[0, :, 15, 0].tolist() == [-1.0, -1.0, 1.0]
