"""Scores a run folder's model with the reference modules (python -m examples.shapes.evaluate).

The tasks are those of `blip3o-rt score` with the same count and seed; the runtime draws nothing here.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from blip3o_rt.measure.shapes.contact_sheet import contact_sheet
from blip3o_rt.measure.shapes.judge import Verdict, judge, read_image
from blip3o_rt.measure.shapes.render import render_batch, to_image
from blip3o_rt.measure.shapes.scene import IMAGE_SIZE, random_scene
from blip3o_rt.measure.shapes.score import Drawn, judge_task, scores, table
from blip3o_rt.measure.shapes.tasks import CATEGORIES, FOREIGN_EDIT, Task, draw_foreign_tasks, draw_tasks
from blip3o_rt.metadata import save_png

from .reference_pipeline import ReferencePipeline
from .train_autoencoder import build_autoencoder
from .training import add_gate_option, enforce, finished_module

BARS = {"held out": 0.9, "single": 0.95, "two": 0.85, "edit": 0.85, "foreign edit": 0.7}
SINGLE_KINDS = ("recolour", "background")  # the edits of foreign-singles


def shares(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Share of images right in every property, and in all of them."""
    names = [*vars(verdicts[0]), "right"]
    return {name: round(sum(getattr(v, name) for v in verdicts) / len(verdicts), 3) for name in names}


def reconstructions(images: torch.Tensor, output: torch.Tensor, path: Path, margin: int = 2) -> None:
    """Writes images [N, 3, H, W] over their reconstructions, side by side."""
    padded = torch.nn.functional.pad(torch.cat([images, output], dim=2), (0, margin), value=0.35)
    save_png(to_image(torch.cat(list(padded), dim=2)), path, {})


@torch.no_grad()
def score_autoencoder(run: Path, count: int, seed: int) -> dict[str, float]:
    """The autoencoder's gate: scenes (held-out ones included) read back right after reconstruction."""
    model = finished_module(build_autoencoder(), run / "autoencoder.pt")
    rng = random.Random(seed)
    scenes = [random_scene(rng) for _ in range(count)]
    images, _ = render_batch(scenes)
    output = (model.decode(model.encode(images * 2 - 1).latent).sample / 2 + 0.5).clamp(0, 1)
    reconstructions(images[:16], output[:16], run / "autoencoder.png")
    verdicts = [judge(read_image(to_image(p)), scene) for p, scene in zip(output, scenes, strict=True)]
    return shares(verdicts) | {"psnr": round(float(-10 * (output - images).square().mean().log10()), 2)}


def pixels(image: Image.Image) -> torch.Tensor:
    """An image as the runtime's image tokenizer reads it, [3, H, W] in [0, 1]."""
    small = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 255


def score_tasks(pipeline: ReferencePipeline, tasks: list[Task], seed: int) -> list[Drawn]:
    """Draws tasks of one category in one batch."""
    given, references = [task.reference for task in tasks], None
    if given[0] is not None:
        references = torch.stack([pixels(image) for image in given if image is not None])
    images, codes = pipeline.generate([task.prompt for task in tasks], references, seed)
    return [
        judge_task(task, to_image(image), planned, 0.0)
        for task, image, planned in zip(tasks, images, codes.tolist(), strict=True)
    ]


def foreign_singles(count: int, seed: int) -> list[Task]:
    """Edits of single shapes that somebody else drew: another color, another background."""
    edits = draw_foreign_tasks(12 * count, seed)  # of which about two in twelve are such
    wanted = [t for t in edits if t.edit and t.edit.kind in SINGLE_KINDS and len(t.edit.before.shapes) == 1]
    return wanted[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of training states")
    parser.add_argument("--count", type=int, default=48, help="images per category")
    parser.add_argument("--seed", type=int, default=100)
    parser.add_argument(
        "--only",
        choices=("autoencoder", "captions", "edits", "foreign", "foreign-singles"),
        help="one part of it; foreign-singles are single shapes recolored or on a new background",
    )
    add_gate_option(parser)
    arguments = parser.parse_args()
    run, count, seed = arguments.run, arguments.count, arguments.seed
    if arguments.only in (None, "autoencoder"):
        print(json.dumps({"autoencoder": score_autoencoder(run, 2 * count, seed)}))
    if arguments.only == "autoencoder":
        return
    captions = [name for name in CATEGORIES if name != "edit"]
    chosen = {"captions": captions, "edits": ["edit"]}
    chosen |= {name: [FOREIGN_EDIT] for name in ("foreign", "foreign-singles")}
    draw_foreign = foreign_singles if arguments.only == "foreign-singles" else draw_foreign_tasks
    tasks = draw_tasks(count, seed) + draw_foreign(count, seed)
    pipeline, drawn = ReferencePipeline(run), []
    for category in chosen.get(arguments.only, [*CATEGORIES, FOREIGN_EDIT]):
        drawn += score_tasks(pipeline, [task for task in tasks if task.category == category], seed)
    save_png(contact_sheet(drawn), run / "evaluation.png", {})
    print(table(drawn))
    measured = {score.category: score.share for score in scores(drawn) if score.name == "right"}
    enforce(
        "joint", measured, {name: bar for name, bar in BARS.items() if name in measured and arguments.gate}
    )


if __name__ == "__main__":
    main()
