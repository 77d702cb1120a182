"""The curves of a run: the reward of the training's rollouts, and the held-out rewards before and after."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("agg")

from matplotlib.figure import Figure

SMOOTH = 10  # steps, of the mean that is drawn over the single steps
NAMES = {"two": ("two shapes", "tab:blue"), "edit": ("edits", "tab:orange")}


def draw_curves(log: Path, path: Path) -> None:
    """Draw a PNG of a log, whose later line of a step replaces the earlier one."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    steps = {line["step"]: line for line in lines if "reward" in line}
    shares = {line["step"]: line for line in lines if "two_reward" in line}
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    training, held_out = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    for offset, (name, (words, color)) in enumerate(NAMES.items()):
        rewards = [line[name] for line in steps.values()]
        training.plot([*steps], rewards, ".", color=color, alpha=0.3, markersize=4)
        windows = [rewards[max(0, end - SMOOTH) : end] for end in range(1, len(rewards) + 1)]
        training.plot([*steps], [sum(some) / len(some) for some in windows], color=color, label=words)
        means, lows, highs = zip(*(line[f"{name}_reward"] for line in shares.values()), strict=True)
        below = [mean - low for mean, low in zip(means, lows, strict=True)]
        above = [high - mean for mean, high in zip(means, highs, strict=True)]
        places = [index + 0.1 * offset for index in range(len(means))]
        held_out.errorbar(places, means, [below, above], fmt="o", capsize=4, color=color)
    training.set(xlabel="step", ylabel="mean reward", title="rollouts of training")
    training.legend(loc="lower right")
    held_out.set(xlim=(-0.4, len(shares) - 0.5), title="held-out, 95%")
    held_out.set_xticks(range(len(shares)), [f"step {step}" for step in shares])
    for axes in (training, held_out):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
