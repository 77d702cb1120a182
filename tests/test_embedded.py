"""What comes with the package draws: a checkpoint in the published layout, found wherever it is installed."""

from __future__ import annotations

from blip3o_rt.config import EditConfig
from blip3o_rt.embedded import embedded_checkpoint
from blip3o_rt.measure.random_checkpoint import folder_name, preset
from blip3o_rt.measure.shapes.judge import judge, read_image
from blip3o_rt.measure.shapes.scene import Scene, Shape
from blip3o_rt.pipeline import Pipeline


def test_it_lies_in_the_package() -> None:
    assert (embedded_checkpoint() / "config.json").is_file()


def test_it_draws_what_it_is_asked() -> None:
    """One easy request of each kind; how often it does is for `blip3o-rt score` to say."""
    pipeline = Pipeline.load(device="cpu")
    (image,) = pipeline.generate("a large red circle in the centre on a blue background", seed=7)
    circle = Shape("red", "circle", "large", "centre")
    assert judge(read_image(image), Scene("blue", (circle,))).right
    (edited,) = pipeline.edit("change the background to yellow", image, seed=7)
    assert judge(read_image(edited), Scene("yellow", (circle,))).right


def test_another_geometry_of_a_random_checkpoint_is_another_folder() -> None:
    plain, edits = preset("tiny", EditConfig()), preset("tiny", EditConfig(use_und_image_vae=True))
    assert folder_name(plain) == folder_name(preset("tiny", EditConfig()))
    assert folder_name(plain) != folder_name(edits)
