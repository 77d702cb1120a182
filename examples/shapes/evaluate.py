"""Scores a run folder's model with the reference modules (python -m examples.shapes.evaluate).

The tasks are those of `blip3o-rt score` with the same count and seed; the runtime draws nothing here.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch

from blip3o_rt.measure.shapes.contact_sheet import contact_sheet
from blip3o_rt.measure.shapes.judge import Verdict, judge, read_picture
from blip3o_rt.measure.shapes.render import render_batch, to_image
from blip3o_rt.measure.shapes.scene import random_scene
from blip3o_rt.measure.shapes.score import Drawn, judge_task, table
from blip3o_rt.measure.shapes.tasks import CATEGORIES, Task, draw_tasks
from blip3o_rt.metadata import save_png

from .reference_pipeline import ReferencePipeline
from .train_autoencoder import build_autoencoder
from .training import finished_module


def shares(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Share of pictures right in every property, and in all of them."""
    names = [*vars(verdicts[0]), "right"]
    return {name: round(sum(getattr(v, name) for v in verdicts) / len(verdicts), 3) for name in names}


def reconstructions(pictures: torch.Tensor, output: torch.Tensor, path: Path, margin: int = 2) -> None:
    """Writes pictures [N, 3, H, W] over their reconstructions, side by side."""
    padded = torch.nn.functional.pad(torch.cat([pictures, output], dim=2), (0, margin), value=0.35)
    save_png(to_image(torch.cat(list(padded), dim=2)), path, {})


@torch.no_grad()
def score_autoencoder(run: Path, count: int, seed: int) -> dict[str, float]:
    """The autoencoder's gate: scenes (held-out ones included) read back right after reconstruction."""
    model = finished_module(build_autoencoder(), run / "autoencoder.pt")
    rng = random.Random(seed)
    scenes = [random_scene(rng) for _ in range(count)]
    pictures, _ = render_batch(scenes)
    output = (model.decode(model.encode(pictures * 2 - 1).latent).sample / 2 + 0.5).clamp(0, 1)
    reconstructions(pictures[:16], output[:16], run / "autoencoder.png")
    verdicts = [judge(read_picture(to_image(p)), scene) for p, scene in zip(output, scenes, strict=True)]
    return shares(verdicts) | {"psnr": round(float(-10 * (output - pictures).square().mean().log10()), 2)}


def score_tasks(pipeline: ReferencePipeline, tasks: list[Task], seed: int) -> list[Drawn]:
    """Draws tasks of one category in one batch."""
    references = None
    if tasks[0].edit is not None:
        references = render_batch([task.edit.before for task in tasks])[0]
    pictures, codes = pipeline.generate([task.prompt for task in tasks], references, seed)
    return [
        judge_task(task, to_image(picture), planned, 0.0)
        for task, picture, planned in zip(tasks, pictures, codes.tolist(), strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of training states")
    parser.add_argument("--count", type=int, default=48, help="pictures per category")
    parser.add_argument("--seed", type=int, default=100)
    parser.add_argument("--only", choices=("autoencoder", "captions", "edits"), help="one part of it")
    arguments = parser.parse_args()
    run, count, seed = arguments.run, arguments.count, arguments.seed
    if arguments.only in (None, "autoencoder"):
        print(json.dumps({"autoencoder": score_autoencoder(run, 2 * count, seed)}))
    if arguments.only == "autoencoder":
        return
    chosen = {"captions": [name for name in CATEGORIES if name != "edit"], "edits": ["edit"]}
    tasks, pipeline, drawn = draw_tasks(count, seed), ReferencePipeline(run), []
    for category in chosen.get(arguments.only, CATEGORIES):
        drawn += score_tasks(pipeline, [task for task in tasks if task.category == category], seed)
    save_png(contact_sheet(drawn), run / "evaluation.png", {})
    print(table(drawn))


if __name__ == "__main__":
    main()
