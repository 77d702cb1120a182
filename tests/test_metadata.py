"""An image's file says how it was made, in any language, and is never half there."""

from __future__ import annotations

import copy
import errno
import io
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from blip3o_rt import __version__
from blip3o_rt.errors import ImageError
from blip3o_rt.metadata import generated_image, image_fields, read_metadata, save_free, save_png
from blip3o_rt.result import Result

PARAMETERS = {"steps": 30, "guidance": 2.0, "top_k": None, "image_tokens_only": True}


def image() -> Image.Image:
    image = Image.new("RGB", (5, 3), (200, 30, 40))
    image.putpixel((4, 2), (1, 2, 3))
    return image


def test_fields_and_pixels_come_back(tmp_path: Path) -> None:
    fields = image_fields("a red circle", 2**63 - 1, PARAMETERS)
    save_png(image(), tmp_path / "a.png", fields)
    assert read_metadata(tmp_path / "a.png") == fields
    assert fields["version"] == f"blip3o_rt {__version__}"
    with Image.open(tmp_path / "a.png") as saved:
        assert saved.tobytes() == image().tobytes()


@settings(deadline=None, derandomize=True, max_examples=40)
@given(prompt=st.text(st.characters(exclude_categories=["Cs"]), max_size=200))
def test_any_prompt_comes_back(tmp_path_factory: pytest.TempPathFactory, prompt: str) -> None:
    path = tmp_path_factory.mktemp("prompt") / "a.png"
    save_png(image(), path, image_fields(prompt, 0, PARAMETERS))
    assert read_metadata(path)["prompt"] == prompt


def test_a_prompt_outside_latin_is_stored_as_utf8_itxt(tmp_path: Path) -> None:
    save_png(image(), tmp_path / "a.png", image_fields("красный круг 红色的圆 🔴", 0, {}))
    content = (tmp_path / "a.png").read_bytes()
    assert b'iTXtblip3o_rt\0\0\0\0\0{"prompt": "' + "красный круг 红色的圆 🔴".encode() in content


def test_a_lone_surrogate_does_not_lose_the_image(tmp_path: Path) -> None:
    save_png(image(), tmp_path / "a.png", image_fields("caf\udce9", 0, {}))
    assert read_metadata(tmp_path / "a.png")["prompt"] == "caf?"


def test_the_same_image_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        save_png(image(), tmp_path / name, image_fields("x", 7, PARAMETERS))
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_png(image(), tmp_path / "a.png", {})
    before = (tmp_path / "a.png").read_bytes()

    def full_disk(self: Image.Image, file: object, **_: object) -> None:
        file.write(b"half an image")  # type: ignore[attr-defined]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_png(image(), tmp_path / "a.png", {})
    assert (tmp_path / "a.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_only_our_fields_are_written(tmp_path: Path) -> None:
    save_png(image(), tmp_path / "a.png", {"dpi": (72, 72), "seed": 3, ("a", 1): 2})
    with Image.open(tmp_path / "a.png") as saved:
        assert saved.info == {"blip3o_rt": '{"seed": 3}'}


def test_an_ordinary_png_has_no_fields(tmp_path: Path) -> None:
    image().save(tmp_path / "a.png")
    assert read_metadata(tmp_path / "a.png") == {}


def test_foreign_text_is_read_as_text(tmp_path: Path) -> None:
    save_png(image(), tmp_path / "a.png", {"prompt": "x", "parameters": "Steps: 20, Sampler: Euler"})
    assert read_metadata(tmp_path / "a.png")["parameters"] == "Steps: 20, Sampler: Euler"


def test_what_is_not_a_png_is_refused(tmp_path: Path) -> None:
    image().save(tmp_path / "a.jpg")
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing of use")
    with pytest.raises(ImageError, match="is a JPEG file: accepted is a PNG"):
        read_metadata(tmp_path / "a.jpg")
    with pytest.raises(ImageError, match="cannot be read as a PNG"):
        read_metadata(tmp_path / "b.png")
    with pytest.raises(ImageError, match="does not exist"):
        read_metadata(tmp_path / "c.png")


ORIGIN = {
    "task": "edit",
    "references": ["ab" * 32],
    "checkpoint": {"name": "mine", "sha256": "cd" * 32},
    "dtype": "bf16",
    "device": "cuda",
}


def chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def test_where_an_image_comes_from_is_kept(tmp_path: Path) -> None:
    fields = image_fields("x", 1, PARAMETERS, **ORIGIN)
    save_png(image(), tmp_path / "a.png", fields)
    assert read_metadata(tmp_path / "a.png") == fields


def test_other_programs_find_none_of_their_keys(tmp_path: Path) -> None:
    """They parse "prompt" as a graph of nodes and "parameters" as settings of their own."""
    save_png(image(), tmp_path / "a.png", image_fields("x", 1, PARAMETERS, **ORIGIN))
    with Image.open(tmp_path / "a.png") as saved:
        assert set(saved.info) == {"blip3o_rt"}


@pytest.mark.parametrize("packed", [False, True])
def test_files_of_the_first_release_are_still_read(tmp_path: Path, packed: bool) -> None:
    image().save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    texts = {
        b"prompt": b"a caf\xc3\xa9",
        b"seed": b"7",
        b"parameters": b'{"steps": 3}',
        b"version": b"blip3o_rt 0",
    }
    chunks = b""
    for key, text in texts.items():
        body = b"\1\0\0\0" + zlib.compress(text) if packed else b"\0\0\0\0" + text
        chunks += chunk(b"iTXt", key + b"\0" + body)
    (tmp_path / "a.png").write_bytes(content[:33] + chunks + content[33:])
    expected = {"prompt": "a caf\xe9", "seed": 7, "parameters": {"steps": 3}, "version": "blip3o_rt 0"}
    assert read_metadata(tmp_path / "a.png") == expected


@pytest.mark.parametrize("name", ["a.png", "a.PNG"])
def test_a_generated_image_keeps_its_metadata_when_saved(tmp_path: Path, name: str) -> None:
    pixels = torch.tensor([0.0, 0.5, 1.0])[None, :, None, None].expand(1, 3, 2, 4)
    fields = image_fields("x", 1, PARAMETERS, **ORIGIN)
    made = generated_image(pixels, fields)
    made.save(tmp_path / name)
    assert read_metadata(tmp_path / name) == fields
    buffer = io.BytesIO()
    copy.deepcopy(made).save(buffer, "PNG")
    (tmp_path / "b.png").write_bytes(buffer.getvalue())
    assert read_metadata(tmp_path / "b.png") == fields
    with Image.open(tmp_path / name) as saved:
        assert saved.convert("RGB").getpixel((3, 1)) == (0, 128, 255)
    made.save(tmp_path / "a.jpg")
    made.save(tmp_path / "c.png", pnginfo=None)
    assert read_metadata(tmp_path / "c.png") == {}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", b"short") + chunk(b"zTXt", b"blip3o_rt"),
        b"\x89PNG\r\n\x1a\n" + b"\xff\xff\xff\xffIDAT" + bytes(20),
        b"\x89PNG\r\n\x1a\n" + chunk(b"iTXt", b"blip3o_rt\0\0\0\0\0" + b"[" * 100_000),
        b"\x89PNG\r\n\x1a\n" + chunk(b"iTXt", b"seed\0\0\0\0\0" + b"9" * 100_000),
        b"\x89PNG\r\n\x1a\n" + chunk(b"zTXt", b"blip3o_rt\0\0" + zlib.compress(bytes(100_000_000))),
        b"\x89PNG\r\n\x1a\n" + chunk(b"tEXt", b"\xff\xfe" * 9),
    ],
)
def test_reading_metadata_raises_nothing_else(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    outcome: object
    try:
        outcome = read_metadata(tmp_path / "a.png")
    except ImageError as error:
        outcome = str(error)
    assert isinstance(outcome, dict) or "\n" not in str(outcome)


@pytest.mark.parametrize(
    "path", [None, 3, b"a.png", "a\0.png", "a" * 5000, ".", "~nobody-of-that-name/a.png"]
)
def test_paths_that_metadata_cannot_be_read_from(path: object) -> None:
    with pytest.raises(ImageError) as caught:
        read_metadata(path)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_links_and_modes_are_kept(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target.png"
    target.parent.mkdir()
    image().save(target)
    target.chmod(0o640)
    (tmp_path / "link.png").symlink_to(target)
    save_png(image(), tmp_path / "link.png", image_fields("x", 1, {}))
    assert (tmp_path / "link.png").is_symlink()
    assert read_metadata(target)["prompt"] == "x"
    assert target.stat().st_mode & 0o777 == 0o640
    assert [path.name for path in target.parent.iterdir()] == ["target.png"]


def test_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(OSError, match="No space left") as caught:
        save_png(image(), tmp_path / "a.png", {})
    assert caught.value.filename == str(tmp_path / "a.png")
    assert caught.value.errno == errno.ENOSPC


def test_the_longest_name_that_the_file_system_holds(tmp_path: Path) -> None:
    name = "a" * 251 + ".png"
    save_png(image(), tmp_path / name, {})
    assert [path.name for path in tmp_path.iterdir()] == [name]


class Raced(Image.Image):
    """An image during whose writing another process writes to the same name."""

    def __init__(self, other: Path) -> None:
        super().__init__()
        self.im, self._mode, self._size = image().im, "RGB", (5, 3)
        self.other = other

    def save(self, *arguments: Any, **keywords: Any) -> None:
        if not self.other.exists():
            save_png(image(), self.other, image_fields("of the other process", 1, {}))
        super().save(*arguments, **keywords)


def test_another_process_that_takes_the_name_meanwhile_keeps_it(tmp_path: Path) -> None:
    first, second = tmp_path / "x-0.png", tmp_path / "x-2-0.png"
    assert save_free(Raced(first), iter([first, second]), image_fields("ours", 1, {})) == second
    assert read_metadata(first)["prompt"] == "of the other process"
    assert read_metadata(second)["prompt"] == "ours"
    assert sorted(tmp_path.iterdir()) == [first, second]


def test_many_writers_of_one_folder_lose_no_image(tmp_path: Path) -> None:
    writers, images = 8, 12
    together = threading.Barrier(writers)

    def write(writer: int) -> list[Path]:
        result = Result([generated_image(torch.zeros(1, 3, 4, 4), {})] * images, [], cast(Any, None))
        for number, drawn in enumerate(result):
            result[number] = drawn.copy()
            result[number].info.update(image_fields(f"{writer} {number}", 0, {}))
        together.wait()
        return result.save(tmp_path)

    with ThreadPoolExecutor(writers) as executor:
        paths = [path for found in executor.map(write, range(writers)) for path in found]
    assert len(set(paths)) == writers * images
    found = {read_metadata(path)["prompt"] for path in paths}
    assert found == {f"{writer} {number}" for writer in range(writers) for number in range(images)}
