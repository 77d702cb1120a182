"""An image's file says how it was made, in any language, and is never half there."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from blip3o_rt import __version__
from blip3o_rt.errors import ImageError
from blip3o_rt.metadata import image_fields, read_metadata, save_png

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
