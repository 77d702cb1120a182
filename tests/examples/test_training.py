"""The training of the embedded model, a few steps of it: every stage, a kill, the export, and train.sh.

`make test` trains the first stage; the others, which start where it ends, are exhaustive.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from blip3o_rt.embedded import embedded_checkpoint
from blip3o_rt.measure.shapes.render import render
from blip3o_rt.measure.shapes.scene import IMAGE_SIZE, Scene, Shape
from blip3o_rt.pipeline import Pipeline
from examples.shapes import evaluate, train_autoencoder, train_image_tokenizer, train_joint, training
from examples.shapes.export import checkpoint_tensors, export
from examples.shapes.image_tokenizer import ImageTokenizer
from examples.shapes.import_checkpoint import import_checkpoint
from examples.shapes.model_config import AUTOENCODER, VISION_TOWER
from examples.shapes.tokenizer import PromptTokenizer

ROOT = Path(__file__).parents[2]
SCENE = Scene("white", (Shape("red", "square", "large", "top left"),))
KILLED_AFTER = 3  # steps; states are saved every second one

# Each stage, as short as it can be: its state's name and how to run it.
STAGES: dict[str, Callable[[Path], None]] = {
    "autoencoder": lambda run: train_autoencoder.train(
        run, steps=4, encoder_steps=1, batch=2, peak=1e-3, seed=1
    ),
    "image_tokenizer": lambda run: train_image_tokenizer.train(
        run, steps=4, batch=2, peak=1e-3, seed=2, foreign=0.5
    ),
    "joint": lambda run: train_joint.train(
        run, steps=4, token_steps=1, batch=4, noises=2, peak=1e-3, seed=3, foreign=0.5
    ),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As the stages are run; also, sums over several threads need not be the same twice."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def short_gates() -> Iterator[None]:
    """What a stage has learned is not judged here, only that it is."""
    with pytest.MonkeyPatch.context() as patch:
        for stage in (train_autoencoder, train_image_tokenizer):
            patch.setattr(stage, "GATE_SCENES", 50)
        yield


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the first stage."""
    run = tmp_path_factory.mktemp("first")
    STAGES["autoencoder"](run)
    return run


@pytest.fixture(scope="module")
def unbroken(first: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of all stages."""
    run = shutil.copytree(first, tmp_path_factory.mktemp("unbroken") / "run")
    for name in ("image_tokenizer", "joint"):
        STAGES[name](run)
    return run


def state(run: Path, name: str) -> dict[str, Any]:
    return torch.load(run / f"{name}.pt", weights_only=True)


def test_the_killed_first_stage_goes_on_to_where_an_unbroken_one_comes(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_killed("autoencoder", first, tmp_path, monkeypatch)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["image_tokenizer", "joint"])
def test_a_killed_stage_goes_on_to_where_an_unbroken_one_comes(
    name: str, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_killed(name, unbroken, tmp_path, monkeypatch)


def check_killed(name: str, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for finished in unbroken.iterdir():
        if finished.stem != name:
            (shutil.copytree if finished.is_dir() else shutil.copyfile)(finished, tmp_path / finished.name)
    module = {"autoencoder": train_autoencoder, "image_tokenizer": train_image_tokenizer}.get(
        name, train_joint
    )
    monkeypatch.setattr(module, "SAVE_EVERY", 2)
    add = training.Log.add

    def killed(log: training.Log, step: int, *arguments: Any) -> None:
        add(log, step, *arguments)
        if step + 1 == KILLED_AFTER:
            raise KeyboardInterrupt

    monkeypatch.setattr(training.Log, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        STAGES[name](tmp_path)
    assert state(tmp_path, name)["step"] == 2
    monkeypatch.setattr(training.Log, "add", add)
    STAGES[name](tmp_path)
    expected, found = state(unbroken, name), state(tmp_path, name)
    assert found["step"] == expected["step"] == 4
    for key in ("model", "weights"):
        assert expected[key].keys() == found[key].keys()
        for tensor in expected[key]:
            assert torch.equal(expected[key][tensor], found[key][tensor]), (key, tensor)


def test_a_kill_while_saving_keeps_the_earlier_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "joint.pt"
    training.save_atomically({"step": 1}, path)

    def half(content: object, target: Path) -> None:
        target.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        training.save_atomically({"step": 2}, path)
    assert training.load_state(path) == {"step": 1}


@pytest.mark.exhaustive
def test_the_encoder_does_not_change_once_it_is_final(tmp_path: Path) -> None:
    """The joint stage learns its latents while the decoder trains on."""
    train_autoencoder.train(tmp_path, steps=1, encoder_steps=1, batch=2, peak=1e-3, seed=1)
    shutil.copyfile(tmp_path / "autoencoder.pt", tmp_path / "early.pt")
    train_autoencoder.train(tmp_path, steps=3, encoder_steps=1, batch=2, peak=1e-3, seed=1)
    early, late = state(tmp_path, "early")["model"], state(tmp_path, "autoencoder")["model"]
    same = {name: torch.equal(early[name], late[name]) for name in early}
    assert all(same[name] for name in same if name.startswith("encoder."))
    assert not any(same[name] for name in same if name.endswith("conv_out.conv.weight"))


@pytest.mark.exhaustive
def test_what_is_exported_loads_and_draws(unbroken: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    export(unbroken, folder)
    export(unbroken, folder)  # and again over it
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    pipeline = Pipeline.load(folder, device="cpu", dtype="fp32")
    [image] = pipeline.generate("a red circle", steps=1)
    assert image.size == (IMAGE_SIZE, IMAGE_SIZE)
    [edited] = pipeline.edit("make the square blue", render(SCENE), steps=1)
    assert edited.size == image.size


# A python for train.sh: writes what it is asked to run, fails the stage FAIL names, takes long over SLOW. The
# image tokenizer takes until the autoencoder in the background is done, unless that one takes long.
PYTHON = """#!/bin/sh
echo "$@" >>"$LOG"
case "$2" in
*.train_autoencoder) echo $$ >"$LOG.pid" ;;
*.train_image_tokenizer)
    until [ -s "$LOG.pid" ]; do :; done
    while [ "$SLOW" != train_autoencoder ] && kill -0 "$(cat "$LOG.pid")" 2>/dev/null; do :; done ;;
esac
case "$2" in *."$FAIL") exit 3 ;; *."$SLOW") exec sleep 60 ;; esac
"""


def train_sh(folder: Path, **environment: str) -> tuple[int, list[str]]:
    """Exit code of train.sh with that python, and the stages it began, in order."""
    python = folder / "python"
    python.write_text(PYTHON)
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    log = folder / "log"
    log.unlink(missing_ok=True)
    settings = {"PYTHON": str(python), "LOG": str(log), "FAIL": "none", "SLOW": "none", **environment}
    script = ROOT / "examples/shapes/train.sh"
    (folder / "log.pid").unlink(missing_ok=True)
    done = subprocess.run(
        ["sh", script, str(folder / "run")], env={**os.environ, **settings}, check=False, timeout=50
    )
    return done.returncode, log.read_text().splitlines()


def test_train_sh_runs_every_stage(tmp_path: Path) -> None:
    code, lines = train_sh(tmp_path, JOINT="--steps 7 --batch 3")
    assert code == 0
    run = tmp_path / "run"
    stages = "examples.shapes.train_autoencoder", "examples.shapes.train_image_tokenizer"
    assert sorted(lines[:2]) == [f"-m {stage} --run {run}" for stage in stages]
    assert lines[2:] == [
        f"-m examples.shapes.train_joint --run {run} --steps 7 --batch 3",
        f"-m examples.shapes.evaluate --run {run}",
        f"-m examples.shapes.export --run {run} --out {run}/export",
    ]


@pytest.mark.parametrize("stage", ["train_autoencoder", "train_image_tokenizer", "train_joint", "evaluate"])
def test_train_sh_stops_where_a_stage_fails(tmp_path: Path, stage: str) -> None:
    """Also where the autoencoder dies in the background, which the joint stage would wait for."""
    code, lines = train_sh(tmp_path, FAIL=stage)
    assert code == 3
    assert not any("export" in line for line in lines)
    if stage == "train_autoencoder":
        assert not any("train_joint" in line for line in lines)


def test_train_sh_leaves_no_stage_behind(tmp_path: Path) -> None:
    """The autoencoder in the background ends with the script: otherwise this would take a minute."""
    code, _ = train_sh(tmp_path, SLOW="train_autoencoder", FAIL="train_joint")
    assert code == 3


def test_an_imported_checkpoint_is_exported_unchanged(tmp_path: Path) -> None:
    import_checkpoint(embedded_checkpoint(), tmp_path)
    tokenizer = PromptTokenizer(tmp_path / "tokenizer")
    tensors, _ = checkpoint_tensors(tmp_path, tokenizer.vocab_size)
    expected = load_file(embedded_checkpoint() / "model.safetensors")
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert train_joint.finished_tokenizer(tmp_path) is not None  # the joint stage sees what it sees


def test_a_geometry_with_more_layers_computes_the_same_at_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.rand(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))

    def computed(run: Path) -> tuple[torch.Tensor, torch.Tensor]:
        import_checkpoint(embedded_checkpoint(), run)
        tokenizer = training.finished_module(ImageTokenizer(), run / "image_tokenizer.pt")
        autoencoder = training.finished_module(train_autoencoder.build_autoencoder(), run / "autoencoder.pt")
        return tokenizer.similarity_and_states(images)[0], autoencoder(images * 2 - 1).sample

    expected = computed(tmp_path / "as it is")
    layers = [number + 1 for number in AUTOENCODER["decoder_layers_per_block"]]
    monkeypatch.setitem(AUTOENCODER, "decoder_layers_per_block", layers)
    monkeypatch.setitem(VISION_TOWER, "num_hidden_layers", VISION_TOWER["num_hidden_layers"] + 2)
    for found, wanted in zip(computed(tmp_path / "grown"), expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("stage", ["autoencoder", "image_tokenizer"])
def test_a_stage_goes_on_from_an_imported_checkpoint(stage: str, tmp_path: Path) -> None:
    """One step with a rate of nothing leaves the weights as they are: they were not begun anew."""
    import_checkpoint(embedded_checkpoint(), tmp_path)
    before = state(tmp_path, stage)
    if stage == "autoencoder":
        train_autoencoder.train(tmp_path, steps=1, encoder_steps=0, batch=2, peak=0.0, seed=1)
    else:
        train_image_tokenizer.train(tmp_path, steps=1, batch=2, peak=0.0, seed=2, foreign=0.5)
    after = state(tmp_path, stage)
    assert after["step"] == 1
    assert all(torch.equal(before["model"][name], after["weights"][name]) for name in before["model"])
    assert after.get("scaling_factor") == before.get("scaling_factor")


def test_foreign_singles_are_single_shapes_recolored_or_on_a_new_background() -> None:
    tasks = evaluate.foreign_singles(20, seed=5)
    edits = [task.edit for task in tasks if task.edit is not None and task.foreign is not None]
    assert len(edits) == 20
    assert {edit.kind for edit in edits} == {"recolour", "background"}
    assert all(len(edit.before.shapes) == len(edit.after.shapes) == 1 for edit in edits)
    assert evaluate.foreign_singles(5, seed=5) == tasks[:5]


def test_a_stage_under_its_bar_is_an_error() -> None:
    training.enforce("joint", {"single": 0.95}, {"single": 0.95})
    with pytest.raises(training.GateError, match=r"joint: single is 0.94, under 0.95\. Train it longer"):
        training.enforce("joint", {"single": 0.94}, {"single": 0.95})


@pytest.mark.exhaustive
def test_a_finished_stage_is_held_to_its_bar(tmp_path: Path) -> None:
    with pytest.raises(training.GateError, match="image tokenizer: scenes_recovered is"):
        train_image_tokenizer.train(
            tmp_path, steps=1, batch=2, peak=1e-3, seed=2, bars=train_image_tokenizer.BARS
        )
