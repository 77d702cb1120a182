"""The outcome of a run, from its log: its summary and its curves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

from matplotlib.figure import Figure

SMOOTH = 10  # steps, of a mean
NAMES = {"two": ("two shapes", "tab:blue"), "edit": ("edits", "tab:orange")}
PARTS = ("rollouts", "judge", "training")


def steps_of(log: Path, key: str) -> dict[int, dict[str, Any]]:
    """The lines of a log that have a key, by step: of a step repeated after a kill the last one."""
    lines = map(json.loads, log.read_text().splitlines())
    return {line["step"]: line for line in lines if key in line}


def summarize(log: Path) -> dict[str, Any]:
    """Means of the first and last ten steps, shares of all steps' seconds, comparisons and evaluations."""

    def means(some: list[dict[str, Any]]) -> dict[str, float]:
        return {key: sum(line[key] for line in some) / len(some) for key in (*NAMES, "logprob", *PARTS)}

    steps = [*steps_of(log, "reward").values()]
    seconds = {name: sum(line[name] for line in steps) for name in PARTS}
    return {
        "first_steps": means(steps[:SMOOTH]),
        "last_steps": means(steps[-SMOOTH:]),
        "shares": {name: some / sum(seconds.values()) for name, some in seconds.items()},
        "comparisons": [*steps_of(log, "our_tokens").values()],
        "evaluations": [*steps_of(log, "two_reward").values()],
    }


def draw_curves(log: Path, path: Path) -> None:
    """Draw a PNG of the rewards: those of the training's rollouts, and those of the held-out tasks."""
    steps, evaluations = steps_of(log, "reward"), steps_of(log, "two_reward")
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    training, held_out = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    for offset, (name, (words, color)) in enumerate(NAMES.items()):
        rewards = [line[name] for line in steps.values()]
        training.plot([*steps], rewards, ".", color=color, alpha=0.3, markersize=4)
        smooth = [sum(rewards[end - SMOOTH : end]) / SMOOTH for end in range(SMOOTH, len(rewards) + 1)]
        training.plot([*steps][SMOOTH - 1 :], smooth, color=color, label=words)
        means, lows, highs = zip(*(line[f"{name}_reward"] for line in evaluations.values()), strict=True)
        below = [mean - low for mean, low in zip(means, lows, strict=True)]
        above = [high - mean for mean, high in zip(means, highs, strict=True)]
        places = [index + 0.1 * offset for index in range(len(means))]
        held_out.errorbar(places, means, [below, above], fmt="o", capsize=4, color=color)
    training.set(xlabel="step", ylabel="mean reward", title="rollouts of training")
    training.legend(loc="lower right")
    held_out.set(xlim=(-0.4, len(evaluations) - 0.5), title="held-out, 95%")
    held_out.set_xticks(range(len(evaluations)), [f"step {step}" for step in evaluations])
    for axes in (training, held_out):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
