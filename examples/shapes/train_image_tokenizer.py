"""Stage 2: trains the image tokenizer on exact labels (python -m examples.shapes.train_image_tokenizer).

A second head, thrown away afterwards, draws each patch's coverage from an early layer: what a shape is
follows from where it is, whatever the colours, and a small tower finds that out many times faster when it
is told.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from blip3o_rt.measure.shapes.codes import CELL, FIRST_SHAPE_CODE, describe_codes, scene_codes
from blip3o_rt.measure.shapes.render import render_batch
from blip3o_rt.measure.shapes.scene import Scene, random_scene, training_scene

from .foreign import draw_mixed, draw_references
from .image_tokenizer import ImageTokenizer
from .model_config import VISION_TOWER
from .training import (
    SAVE_EVERY,
    Bars,
    Log,
    WeightAverage,
    add_gate_option,
    autocast,
    enforce,
    learning_rate,
    load_state,
    save_atomically,
)

COSINE_SCALE = 30.0
SHAPE_WEIGHT = 4.0  # of a cell that holds a shape, against one of background
NOISE = 0.04  # standard deviation added to pixels, so that generated images are read as well
BLUR_SHARE = 0.3
COVERAGE_WEIGHT = 5.0
COVERAGE_LAYER = 2  # hidden state that the coverage head reads
BARS = {"scenes_recovered": 0.95, "foreign_recovered": 0.9}
GATE_SCENES = 500


def roughen(images: torch.Tensor) -> torch.Tensor:
    """Noise, a slight colour cast, and for some images a blur: what generated images suffer from."""
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    chosen = (torch.rand(len(images), 1, 1, 1) < BLUR_SHARE).float()
    images = images + chosen * (blurred - images)
    cast = torch.randn(len(images), 3, 1, 1) * NOISE / 2
    strength = torch.rand(len(images), 1, 1, 1) * NOISE
    return (images + cast + strength * torch.randn_like(images)).clamp(0, 1)


def tokenizer_loss(
    model: ImageTokenizer, coverage_head: nn.Linear, scenes: list[Scene], foreign: int, rng: random.Random
) -> tuple[torch.Tensor, dict[str, float]]:
    """Cross-entropy of the scaled cosines against the cells' codes, plus the coverage's; and a report.

    The first `foreign` scenes are shown as others draw them; their codes are the exact scene's.
    """
    target = torch.tensor([scene_codes(scene) for scene in scenes])
    images, covered = draw_mixed(scenes, foreign, rng)
    with autocast():
        similarity, states = model.similarity_and_states(roughen(images))
        drawn = coverage_head(states[COVERAGE_LAYER])
    shape_cells = target >= FIRST_SHAPE_CODE
    weight = torch.where(shape_cells, SHAPE_WEIGHT, 1.0)
    loss = F.cross_entropy(
        COSINE_SCALE * similarity.float().flatten(0, 1), target.flatten(), reduction="none"
    )
    codes_loss = (loss * weight.flatten()).sum() / weight.sum()
    patches = F.unfold(covered, CELL, stride=CELL).transpose(1, 2)
    coverage_loss = F.binary_cross_entropy_with_logits(drawn.float(), patches)
    right = (similarity.detach().argmax(-1) == target)[shape_cells].float().mean()
    report = {
        "codes": float(codes_loss.detach()),
        "coverage": float(coverage_loss.detach()),
        "shape_cells_right": float(right),
    }
    return codes_loss + COVERAGE_WEIGHT * coverage_loss, report


@torch.no_grad()
def gate(model: ImageTokenizer, count: int, seed: int = 11) -> dict[str, float]:
    """Shares of scenes (held-out ones too) recovered from codes alone, by who drew them, and exact grids."""
    rng = random.Random(seed)
    scenes = [random_scene(rng) for _ in range(count)]
    own = model.encode(render_batch(scenes)[0])
    exact = (own == torch.tensor([scene_codes(scene) for scene in scenes])).all(dim=1)
    return {
        "scenes_recovered": recovered(scenes, own),
        "foreign_recovered": recovered(scenes, model.encode(draw_references(scenes, rng)[0])),
        "grids_exact": round(float(exact.float().mean()), 4),
    }


def recovered(scenes: list[Scene], codes: torch.Tensor) -> float:
    """Share of scenes that their codes [N, tokens] describe."""
    found = map(describe_codes, codes.tolist())
    return sum(one.shows_the_same(scene) for scene, one in zip(scenes, found, strict=True)) / len(scenes)


def train(
    run: Path, steps: int, batch: int, peak: float, seed: int, foreign: float = 0.0, bars: Bars | None = None
) -> None:
    """Runs or resumes the stage; leaves run/image_tokenizer.pt. Raises GateError under a bar."""
    path = run / "image_tokenizer.pt"
    torch.manual_seed(seed)
    model = ImageTokenizer().train()
    coverage_head = nn.Linear(VISION_TOWER["hidden_size"], CELL * CELL)
    trained = [p for p in (*model.parameters(), *coverage_head.parameters()) if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    average = WeightAverage([model], 0.998)
    first = 0
    if (state := load_state(path)) is not None:
        first = state["step"]
        model.load_state_dict(state["weights"])
        if first:  # an imported state has the weights alone
            coverage_head.load_state_dict(state["coverage_head"])
            optimiser.load_state_dict(state["optimiser"])
        average.average = state["average"] if first else [p.detach().clone() for p in model.parameters()]
    log = Log(run / "image_tokenizer.jsonl", every=100)

    def save(step: int) -> None:
        average.swap()
        averaged = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        average.swap()
        save_atomically(
            {
                "step": step,
                "model": averaged,
                "weights": model.state_dict(),
                "coverage_head": coverage_head.state_dict(),
                "optimiser": optimiser.state_dict(),
                "average": average.average,
                "finished": step >= steps,
            },
            path,
        )

    def measure() -> dict[str, float]:
        average.swap()
        measured = gate(model, 100)
        average.swap()
        return measured

    for step in range(first, steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        rng = random.Random(seed * 1_000_003 + step)
        torch.manual_seed(seed * 1_000_003 + step)
        scenes = [training_scene(rng) for _ in range(batch)]
        loss, report = tokenizer_loss(model, coverage_head, scenes, round(foreign * batch), rng)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        average.update(step)
        log.add(step, report, measure)
        if (step + 1) % SAVE_EVERY == 0:
            save(step + 1)
    save(steps)
    average.swap()
    enforce("image tokenizer", gate(model, GATE_SCENES), bars or {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of training states and logs")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--peak", type=float, default=1.5e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--foreign", type=float, default=0.5, help="share of images that others drew")
    add_gate_option(parser)
    arguments = parser.parse_args()
    bars = BARS if arguments.gate else {}
    train(
        arguments.run,
        arguments.steps,
        arguments.batch,
        arguments.peak,
        arguments.seed,
        arguments.foreign,
        bars,
    )


if __name__ == "__main__":
    main()
