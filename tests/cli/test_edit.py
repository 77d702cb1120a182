"""blip3o-rt edit: the reference images are read first and reach the model with every option."""

from __future__ import annotations

import pytest
from PIL import Image

from blip3o_rt.metadata import image_fields, read_metadata, save_png
from tests.cli.conftest import Command, FakePipeline


@pytest.fixture
def photo(command: Command) -> str:
    Image.new("RGBA", (4, 2), (0, 255, 0, 255)).save(command.folder / "photo.png")
    return "photo.png"


def test_prompt_images_and_options_reach_the_model(
    command: Command, pipeline: type[FakePipeline], photo: str
) -> None:
    options = "-n 2 --seed 5 --steps 4 --out o --device cpu"
    assert command("edit", "make it green", photo, photo, *options.split()) == 0
    load, edit = pipeline.calls
    assert load[2]["device"] == "cpu"
    assert edit[0] == "edit"
    prompt, references = edit[1]
    assert prompt == "make it green"
    assert [(image.mode, image.size, image.getpixel((0, 0))) for image in references] == [
        ("RGB", (4, 2), (0, 255, 0))
    ] * 2
    assert (edit[2]["n"], edit[2]["seed"], edit[2]["steps"]) == (2, 5, 4)
    assert command.files() == ["o/make-it-green-5.png", "o/make-it-green-6.png", "photo.png"]
    assert read_metadata(command.folder / "o/make-it-green-6.png")["seed"] == 6


def test_a_missing_image_is_refused_before_the_model_is_loaded(
    command: Command, pipeline: type[FakePipeline], photo: str
) -> None:
    assert "'none.png' does not exist" in command.refused("edit", "x", photo, "none.png")
    assert pipeline.calls == []


def test_what_is_no_image(command: Command, pipeline: type[FakePipeline]) -> None:
    (command.folder / "notes.txt").write_text("not an image")
    assert "is not an image" in command.refused("edit", "x", "notes.txt")


def test_the_reference_may_be_replaced_by_its_edit(
    command: Command, pipeline: type[FakePipeline], photo: str
) -> None:
    assert command("edit", "x", photo, "--out", photo) == 0
    assert command.files() == ["photo.png"]
    assert read_metadata(command.folder / photo)["prompt"] == "x"


def test_several_edits_into_one_file(command: Command, pipeline: type[FakePipeline], photo: str) -> None:
    assert "give a folder" in command.refused("edit", "x", photo, "-n", "2", "--out", "x.png")


def test_an_image_is_needed(command: Command) -> None:
    assert "IMAGE" in command.refused("edit", "x")


def test_a_report_never_replaces_the_reference(
    command: Command, pipeline: type[FakePipeline], photo: str
) -> None:
    before = (command.folder / photo).read_bytes()
    assert "is read from" in command.refused("edit", "x", photo, "--report", photo)
    assert (command.folder / photo).read_bytes() == before


def test_an_address_is_not_fetched(command: Command, pipeline: type[FakePipeline]) -> None:
    assert "is a URL and nothing is fetched" in command.refused("edit", "x", "https://example.org/a.png")
    message = command.refused("edit", "x", "data:image/png;base64," + "A" * 5000)
    assert "is a data URI" in message
    assert len(message) < 150


def test_options_may_stand_between_prompt_and_images(
    command: Command, pipeline: type[FakePipeline], photo: str
) -> None:
    assert command("edit", "--steps", "2", "x", "--seed", "3", photo, "--quiet", photo) == 0
    call = pipeline.calls[1]
    assert (call[1][0], len(call[1][1]), call[2]["steps"], call[2]["seed"]) == ("x", 2, 2, 3)


def test_like_edits_again(command: Command, pipeline: type[FakePipeline], photo: str) -> None:
    fields = image_fields("make it red", 3, {"steps": 4}, task="edit")
    save_png(Image.new("RGB", (1, 1)), command.folder / "like.png", fields)
    assert "IMAGE" in command.refused("edit", "--like", "like.png")
    assert command("edit", photo, "--like", "like.png", photo) == 0
    call = pipeline.calls[1]
    assert call[1][0] == "make it red"
    assert len(call[1][1]) == 2
    assert (call[2]["seed"], call[2]["steps"]) == (3, 4)


def test_notes_about_an_image_are_lines_of_ours(command: Command, pipeline: type[FakePipeline]) -> None:
    Image.new("RGB", (4, 2)).save(
        command.folder / "a.png", icc_profile=b"nonsense", exif=b"Exif\0\0MM\0*broken"
    )
    assert command("edit", "x", "a.png") == 0
    (line,) = command.errors.splitlines()
    assert line.startswith("blip3o-rt: warning: 'a.png': its color profile cannot be used")
    assert command("edit", "x", "a.png", "--quiet") == 0
    assert command.errors == ""
