"""GRPO of the shapes model: its objective in float64, its tasks and its start, and two steps of all of it."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from blip3o_rt.embedded import embedded_checkpoint
from blip3o_rt.measure.shapes.edits import EDIT_KINDS
from blip3o_rt.measure.shapes.render import render
from blip3o_rt.measure.shapes.scene import (
    BACKGROUNDS,
    HELD_OUT,
    PLACES,
    Scene,
    Shape,
    is_drawable,
    training_scene,
)
from blip3o_rt.measure.shapes.score import judge_task
from blip3o_rt.pipeline import Pipeline
from examples.grpo import outcome, start, train
from examples.shapes.import_checkpoint import import_checkpoint
from examples.shapes.reference_pipeline import ReferencePipeline
from tests.rl import oracle


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> ReferencePipeline:
    """The embedded model in transformers and diffusers."""
    run = tmp_path_factory.mktemp("run")
    import_checkpoint(embedded_checkpoint(), run)
    return ReferencePipeline(run)


def test_advantages_are_of_each_group() -> None:
    rewards = np.random.default_rng(0).random((3, 8))
    rewards[1] = 0.25
    found = train.advantages(torch.tensor(rewards, dtype=torch.float32)).numpy()
    for row, expected in zip(found, rewards, strict=True):
        deviation = np.sqrt(((expected - expected.mean()) ** 2).sum() / 7)
        assert np.allclose(row, (expected - expected.mean()) / (deviation + 1e-4), atol=1e-5)
    assert not found[1].any()


def test_the_clipped_loss_and_its_gradient() -> None:
    """Against the definition, element by element; where the ratio is clipped there is no gradient."""
    rng = np.random.default_rng(1)
    old = rng.normal(-2, 1, (4, 30))
    new = old + rng.normal(0, 0.4, old.shape)
    advantage = np.array([1.5, -0.5, 0.0, -2.0])
    loss, gradient, clipped = 0.0, np.zeros_like(new), 0
    for row, column in np.ndindex(new.shape):
        ratio, gain = np.exp(new[row, column] - old[row, column]), advantage[row]
        bounded = min(max(ratio, 0.8), 1.2) * gain
        loss -= min(ratio * gain, bounded) / new.size
        if ratio * gain <= bounded:
            gradient[row, column] = -ratio * gain / new.size
        else:
            clipped += 1
    leaf = torch.tensor(new, requires_grad=True)
    found = train.loss_of(leaf, torch.tensor(old), torch.tensor(advantage))
    found.backward()
    assert 10 < clipped < new.size - 10
    assert float(found.detach()) == pytest.approx(loss, rel=1e-12)
    assert np.allclose(leaf.grad.numpy(), gradient, rtol=1e-12, atol=1e-15)


def test_log_probs_are_those_of_the_rollouts(reference: ReferencePipeline) -> None:
    """Of captions and edits, by the trainer and by an independent pass; of other weights they are refused."""
    pipe = Pipeline.load(device="cpu", dtype="fp32", max_batch=8)
    model = reference.model.language_model
    groups = train.rollouts_of(pipe, train.tasks(2, 3), 2, 5, images=False)
    decoder = oracle.decoder_of(embedded_checkpoint())
    for group in groups:
        found = train.log_probs(model, group).detach()
        for row, one in zip(found, group, strict=True):
            expected = oracle.raw_log_probs(
                oracle.logits(decoder, one.prompt_ids, one.token_ids), one.token_ids
            )
            assert torch.allclose(row.double(), expected, rtol=0, atol=train.AGREEMENT)
    assert train.check_agreement(model, groups) < train.AGREEMENT
    head = model.lm_head.weight
    head.data *= 1.01
    with pytest.raises(ValueError, match="apart"):
        train.check_agreement(model, groups)
    head.data /= 1.01


def test_training_never_sees_what_is_held_out() -> None:
    def combinations(task: Any) -> set[tuple[str, str, str]]:
        scenes = [task.scene] if task.edit is None else [task.edit.before, task.edit.after]
        return {(s.colour, s.kind, scene.background) for scene in scenes for s in scene.shapes}

    trained = [task for seed in range(50) for task in train.tasks(4, seed)]
    unseen = train.tasks(120, 10**6, held_out=True)
    assert not any(combinations(task) & HELD_OUT for task in trained)
    assert all(combinations(task) & HELD_OUT for task in unseen)
    for some in (trained, unseen):
        assert Counter(task.category for task in some) == {"two": len(some) // 2, "edit": len(some) // 2}
    assert Counter(task.edit.kind for task in unseen if task.edit) == dict.fromkeys(EDIT_KINDS, 10)
    assert {task.edit.kind for task in trained if task.edit} == set(EDIT_KINDS)
    assert len({task.seed for task in unseen}) == len(unseen)
    assert train.tasks(4, 7) == train.tasks(4, 7) != train.tasks(4, 8)


def test_the_reward_is_half_for_the_properties_and_half_for_all() -> None:
    (task,) = train.tasks(1, 0)
    exact = judge_task(task, render(task.scene), [], 0.0)
    assert train.reward(exact) == 1.0
    other = next(
        b for b in BACKGROUNDS if all(b not in (s.colour, task.scene.background) for s in task.scene.shapes)
    )
    wrong = judge_task(task, render(Scene(other, task.scene.shapes)), [], 0.0)
    assert train.reward(wrong) == pytest.approx(5 / 6 / 2)  # five of six properties
    edit = next(one for one in train.tasks(24, 0) if one.edit is not None and one.edit.kind == "recolour")
    undone = judge_task(edit, render(edit.edit.before), [], 0.0)
    assert train.reward(undone) == pytest.approx(6 / 7 / 2)  # all but the color, what may not change included


def test_a_mistaken_scene_is_one_property_off() -> None:
    rng = random.Random(0)
    for _ in range(500):
        scene = training_scene(rng)
        other = start.mistaken(scene, rng)
        changed = [("background", scene.background, other.background)] + [
            (name, value, getattr(after, name))
            for before, after in zip(scene.shapes, other.shapes, strict=True)
            for name, value in vars(before).items()
        ]
        assert sum(a != b for _, a, b in changed) == (other != scene)
        assert is_drawable(other)
        assert not {(s.colour, s.kind, other.background) for s in other.shapes} & HELD_OUT
        assert other != scene or (not scene.shapes and scene.background == "orange")
    background = next(b for b in BACKGROUNDS if b != "red" and ("red", "star", b) not in HELD_OUT)
    corner = Scene(background, (Shape("red", "star", "small", "top left"),))
    found = {start.mistaken(corner, rng) for _ in range(200)}
    assert Scene(background, (Shape("red", "star", "small", "bottom right"),)) in found
    assert Scene(background, (Shape("red", "star", "large", "top left"),)) in found
    assert start.opposite(PLACES, "centre") == "centre"


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_stated_share_of_captions_is_wrong(share: float, reference: ReferencePipeline) -> None:
    """The scenes of the same pairs with and without mistakes."""
    count, wrong, possible = 150, 0, 0
    for given, right in zip(
        start.noisy_batches(random.Random(4), count, share, reference),
        pairs_without_mistakes(random.Random(4), count, reference),
        strict=True,
    ):
        wrong += sum(scene != other for scene, other in zip(given.scenes, right, strict=True))
        possible += sum(bool(scene.shapes) or scene.background != "orange" for scene in right)
    assert possible > 2 * count - 10
    assert abs(wrong / possible - share) <= 3 * (share * (1 - share) / possible) ** 0.5


def pairs_without_mistakes(
    rng: random.Random, count: int, reference: ReferencePipeline
) -> tuple[list[Scene], list[Scene]]:
    captions, edits = start.noisy_batches(rng, count, 0.0, reference)
    return captions.scenes, edits.scenes


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Of 12 steps, of which a run that was killed at 5 repeated 4 and 5."""
    lines: list[dict[str, Any]] = [{"start": 20, "loss": 1.0}]
    for step in (1, 2, 3, 4, 5, 4, *range(5, 13)):
        parts = {"rollouts": 3.0, "judge": 1.0, "training": float(step)}
        lines.append({"step": step, "reward": 0.5, "two": step / 100, "edit": 1.0, "logprob": -step, **parts})
    lines[5] |= {"training": 1e6, "two": 1e6}
    scores = {key: [0.5, 0.25, 0.75] for key in ("two_reward", "edit_reward")}
    lines += [
        {"step": 0, **scores},
        {"step": 12, "wrong": {"kind": 3}, **scores},
        {"step": 6, "our_tokens": 2},
    ]
    path = tmp_path / "log.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def test_the_summary_counts_each_step_once(log: Path) -> None:
    found = outcome.summarize(log)
    assert found["first_steps"]["two"] == pytest.approx(0.055)  # of steps 1 to 10
    assert found["last_steps"]["logprob"] == pytest.approx(-7.5)  # of steps 3 to 12
    assert found["shares"] == pytest.approx({"rollouts": 36 / 126, "judge": 12 / 126, "training": 78 / 126})
    assert found["comparisons"] == [{"step": 6, "our_tokens": 2}]
    assert [line["step"] for line in found["evaluations"]] == [0, 12]


def test_the_smoothed_curve_begins_with_ten_steps(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    outcome.draw_curves(log, log)
    dots, smooth, *_ = figures[0].axes[0].get_lines()
    assert list(dots.get_xdata()) == list(range(1, 13))
    assert list(smooth.get_xdata()) == [10, 11, 12]
    assert smooth.get_ydata() == pytest.approx([0.055, 0.065, 0.075])


def test_what_is_wrong_is_counted_by_property() -> None:
    some = train.tasks(24, 0)
    drawn = [judge_task(task, render(task.scene), [], 0.0) for task in some]
    assert train.measured(drawn)["wrong"] == {}
    index = next(i for i, task in enumerate(some) if task.edit is not None and task.edit.kind == "recolour")
    drawn[index] = judge_task(some[index], render(some[index].edit.before), [], 0.0)
    assert train.measured(drawn)["wrong"] == {"colour": 1}


def test_another_run_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other arguments or fewer steps than a folder has, and a tree without kernels; the same go on."""

    class Killed(Exception):
        """Where the start would be made."""

    def started(*given: str) -> None:
        monkeypatch.setattr("sys.argv", ["train", "--out", str(tmp_path), *given])
        with pytest.raises(Killed):
            train.main()

    def refused(*given: str) -> str:
        monkeypatch.setattr("sys.argv", ["train", "--out", str(tmp_path), *given])
        with pytest.raises(SystemExit) as stopped:
            train.main()
        error = capsys.readouterr().err
        assert stopped.value.code == 2
        assert error.count("\n") == 1
        return error

    def kill(*_: Any) -> None:
        raise Killed

    monkeypatch.setattr(train, "make_start", kill)
    started("--wrong", "0.25")
    started("--wrong", "0.25", "--steps", "7")
    assert "--wrong 0.25 --seed 0: repeat" in refused("--seed", "1")
    torch.save({"step": 40}, tmp_path / "state.pt")
    assert "--steps 40: repeat" in refused("--wrong", "0.25", "--steps", "39")
    started("--wrong", "0.25", "--steps", "40")
    monkeypatch.setattr("blip3o_rt.ops.native.cpu_module", lambda: None)
    assert "make build" in refused("--wrong", "0.25")


@pytest.mark.exhaustive
def test_two_steps_of_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The start and the trained model are checkpoints that draw; a run that was killed goes on."""
    rng = random.Random(0)
    monkeypatch.setattr(
        train, "reward", lambda drawn: rng.random()
    )  # two steps of the real one may find no fault
    monkeypatch.setattr(train, "SAVE_EVERY", 1)
    arguments = ["--start-steps", "1", "--start-batch", "4", "--start-rate", "0.01", "--evaluate", "2"]
    arguments += ["--prompts", "2", "--samples", "2", "--learning-rate", "1e-3", "--out", str(tmp_path)]
    for steps in ("1", "2"):
        monkeypatch.setattr("sys.argv", ["train", *arguments, "--steps", steps])
        train.main()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "reward" in line] == [1, 2]
    assert all(
        {"times_tokens", "times_rollouts", "times_rollouts_at_30"} <= set(x)
        for x in lines
        if "our_tokens" in x
    )
    assert sum("two_reward" in line for line in lines) == 3  # before, and at the end of either run
    for name in ("before", "after", "curves"):
        Image.open(tmp_path / f"{name}.png").verify()
    sums = set()
    for folder in (None, tmp_path / "start", tmp_path / "trained"):
        pipe = Pipeline.load(folder, device="cpu", dtype="fp32")
        sums.add(pipe.weights_checksum())
        assert pipe.generate("a red circle on a blue background", steps=2)[0].size == (64, 64)
    assert len(sums) == 3
    last = json.loads((tmp_path / "summary.json").read_text())["evaluations"][-1]
    assert last["step"] == 2
    assert last["checksum"] == pipe.weights_checksum()  # of the trained model, which was loaded last
