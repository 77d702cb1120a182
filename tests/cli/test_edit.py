"""blip3o-rt edit: the reference images are read first and reach the model with every option."""

from __future__ import annotations

import pytest
from PIL import Image

from blip3o_rt.metadata import read_metadata
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
