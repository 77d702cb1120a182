"""Scores a run folder's model with the reference modules (python -m examples.shapes.evaluate)."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch

from blip3o_rt.shapes.captions import caption
from blip3o_rt.shapes.codes import describe_codes
from blip3o_rt.shapes.edits import random_edit
from blip3o_rt.shapes.judge import Verdict, judge, judge_edit, read_picture
from blip3o_rt.shapes.render import render, render_batch, to_image
from blip3o_rt.shapes.scene import Scene, held_out_scene, random_scene, training_scene

from .reference_pipeline import ReferencePipeline
from .train_autoencoder import build_autoencoder
from .training import finished_module


def shares(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Share of pictures right in every property, and in all of them."""
    names = [*vars(verdicts[0]), "right"]
    return {name: round(sum(getattr(v, name) for v in verdicts) / len(verdicts), 3) for name in names}


def same_scene(found: Scene, scene: Scene) -> bool:
    """Whether two scenes show the same, whatever the order of their shapes."""
    return found.background == scene.background and set(found.shapes) == set(scene.shapes)


def contact_sheet(pictures: torch.Tensor, path: Path, columns: int = 8, margin: int = 2) -> None:
    """Writes pictures [N, 3, H, W] as a grid."""
    rows = -(-len(pictures) // columns)
    height, width = pictures.shape[2] + margin, pictures.shape[3] + margin
    sheet = torch.full((3, rows * height, columns * width), 0.35)
    for index, picture in enumerate(pictures):
        row, column = divmod(index, columns)
        sheet[
            :, row * height : (row + 1) * height - margin, column * width : (column + 1) * width - margin
        ] = picture
    to_image(sheet).save(path)


@torch.no_grad()
def score_autoencoder(run: Path, count: int, seed: int) -> dict[str, float]:
    """The autoencoder's gate: scenes (held-out ones included) read back right after reconstruction."""
    model = finished_module(build_autoencoder(), run / "autoencoder.pt")
    rng = random.Random(seed)
    scenes = [random_scene(rng) for _ in range(count)]
    pictures, _ = render_batch(scenes)
    output = (model.decode(model.encode(pictures * 2 - 1).latent).sample / 2 + 0.5).clamp(0, 1)
    contact_sheet(torch.cat([pictures[:16], output[:16]]), run / "autoencoder.png")
    verdicts = [judge(read_picture(to_image(p)), scene) for p, scene in zip(output, scenes, strict=True)]
    return shares(verdicts) | {"psnr": round(float(-10 * (output - pictures).square().mean().log10()), 2)}


def score_captions(
    pipeline: ReferencePipeline, scenes: list[Scene], seed: int, sheet: Path
) -> dict[str, float]:
    """Complete captions of scenes: shares right in pixels, and in the planned codes."""
    rng = random.Random(seed)
    prompts = [caption(scene, rng, complete=True) for scene in scenes]
    pictures, codes = pipeline.generate(prompts, None, seed)
    contact_sheet(pictures, sheet)
    sheet.with_suffix(".txt").write_text("\n".join(prompts) + "\n")
    verdicts = [judge(read_picture(to_image(p)), scene) for p, scene in zip(pictures, scenes, strict=True)]
    planned = [same_scene(describe_codes(c), scene) for c, scene in zip(codes.tolist(), scenes, strict=True)]
    return shares(verdicts) | {"codes_right": round(sum(planned) / len(planned), 3)}


def score_edits(pipeline: ReferencePipeline, count: int, seed: int, sheet: Path) -> dict[str, float]:
    """Edits of rendered scenes, by kind and together."""
    rng = random.Random(seed)
    edits = [random_edit(rng) for _ in range(count)]
    references = render_batch([edit.before for edit in edits])[0]
    pictures, codes = pipeline.generate([edit.instruction for edit in edits], references, seed)
    pairs = torch.stack([references, pictures], dim=1).flatten(0, 1)
    contact_sheet(pairs, sheet)
    sheet.with_suffix(".txt").write_text("\n".join(edit.instruction for edit in edits) + "\n")
    verdicts = [judge_edit(to_image(p), render(e.before), e) for p, e in zip(pictures, edits, strict=True)]
    planned = [same_scene(describe_codes(c), e.after) for c, e in zip(codes.tolist(), edits, strict=True)]
    result = shares(verdicts) | {"codes_right": round(sum(planned) / len(planned), 3)}
    for kind in sorted({edit.kind for edit in edits}):
        of_kind = [v.right for v, e in zip(verdicts, edits, strict=True) if e.kind == kind]
        result[f"right_{kind}"] = round(sum(of_kind) / len(of_kind), 3)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of training states")
    parser.add_argument("--count", type=int, default=48, help="pictures per category")
    parser.add_argument("--seed", type=int, default=100)
    parser.add_argument("--only", choices=("autoencoder", "captions", "edits"), help="one part of it")
    arguments = parser.parse_args()
    run, count, seed = arguments.run, arguments.count, arguments.seed
    report = {}
    if arguments.only in (None, "autoencoder"):
        report["autoencoder"] = score_autoencoder(run, 2 * count, seed)
    if arguments.only != "autoencoder":
        pipeline, rng = ReferencePipeline(run), random.Random(seed)
        if arguments.only != "edits":
            kinds = {
                "single_held_out": [held_out_scene(rng) for _ in range(count)],
                "single": [training_scene(rng, 1) for _ in range(count)],
                "two": [random_scene(rng, 2) for _ in range(count)],
            }
            for name, scenes in kinds.items():
                report[name] = score_captions(pipeline, scenes, seed, run / f"{name}.png")
        if arguments.only != "captions":
            report["edits"] = score_edits(pipeline, count, seed, run / "edits.png")
    for name, values in report.items():
        print(json.dumps({"part": name} | values))


if __name__ == "__main__":
    main()
