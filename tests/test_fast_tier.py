"""Switches that act while an image is made: named wherever an image is, which depends on no other one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from blip3o_rt.checkpoint.convert import convert
from blip3o_rt.checkpoint.load import load_checkpoint
from blip3o_rt.checkpoint.manifest import Manifest
from blip3o_rt.errors import ParameterError
from blip3o_rt.measure.random_checkpoint import preset, write_random_checkpoint
from blip3o_rt.metadata import read_metadata
from blip3o_rt.pipeline import Pipeline

SWITCHES = {"guidance_interval": "0.2:0.8", "step_cache": "2", "solver": "dpm++"}
STEPS = 5


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    write_random_checkpoint(folder, preset("tiny"), seed=1)
    return folder


def load(checkpoint: Path, switches: dict[str, str] | None = None) -> Pipeline:
    tier = "fast" if switches else "exact"
    return Pipeline.load(checkpoint, device="cpu", dtype="fp32", tier=tier, switches=switches, max_batch=3)


def levels(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


def test_an_image_of_the_fast_tier_says_so_and_depends_on_no_other(checkpoint: Path, tmp_path: Path) -> None:
    fast = load(checkpoint, SWITCHES)
    together = fast.generate(["a circle", "a square"], n=2, seed=3, steps=STEPS)
    (alone,) = load(checkpoint, SWITCHES).generate("a square", seed=4, steps=STEPS)
    assert np.array_equal(levels(together[3]), levels(alone))
    assert dict(together.report.switches) == SWITCHES
    (path,) = fast.generate("a square", seed=4, steps=STEPS).save(tmp_path)
    drawn = read_metadata(path)["parameters"]
    assert (drawn["tier"], drawn["switches"]) == ("fast", SWITCHES)


def test_an_image_says_how_its_plan_was_made_whoever_renders_it(checkpoint: Path) -> None:
    switches = {"ar_weights": "int8", "step_cache": "2"}
    exact, fast = load(checkpoint), load(checkpoint, switches)

    def said(planner: Pipeline, renderer: Pipeline) -> tuple[str, dict[str, str]] | None:
        image = renderer.render(planner.plan("a circle"), steps=1)
        assert isinstance(image, Image.Image)
        drawn = image.info["parameters"]
        return (drawn["tier"], drawn["switches"]) if "tier" in drawn else None

    assert said(exact, exact) is None
    assert said(fast, exact) == ("fast", {"ar_weights": "int8"})
    assert said(exact, fast) == ("fast", {"step_cache": "2"})
    assert said(fast, fast) == ("fast", switches)


@pytest.mark.parametrize("name", SWITCHES)
def test_each_changes_the_image_and_nothing_of_the_plan(checkpoint: Path, name: str) -> None:
    exact = load(checkpoint).generate("a circle", steps=STEPS)
    fast = load(checkpoint, {name: SWITCHES[name]}).generate("a circle", steps=STEPS)
    assert exact.plans[0].token_ids.equal(fast.plans[0].token_ids)
    assert not np.array_equal(levels(exact[0]), levels(fast[0]))


def test_settings_that_leave_nothing_out_give_the_exact_image(checkpoint: Path) -> None:
    exact = load(checkpoint).generate("a circle", steps=STEPS)[0]
    off = load(checkpoint, {"guidance_interval": "0:1", "step_cache": "1"})
    assert np.array_equal(levels(off.generate("a circle", steps=STEPS)[0]), levels(exact))


def test_weights_are_converted_for_none_of_them(checkpoint: Path, tmp_path: Path) -> None:
    """A published checkpoint's cached conversion is the exact tier's, and serves both."""
    for switches in (SWITCHES, None):
        load_checkpoint(checkpoint, switches=switches, cache_dir=tmp_path)
    (cached,) = tmp_path.iterdir()
    assert Manifest.read(cached).switches == {}
    assert load_checkpoint(cached, switches=SWITCHES).switches == SWITCHES
    with pytest.raises(ParameterError, match="switch solver acts while an image is made"):
        convert(checkpoint, tmp_path / "other", switches={"solver": "dpm++"}, progress=False)
