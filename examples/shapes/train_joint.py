"""Stage 3: trains the decoder and the diffusion transformer together (python -m examples.shapes.train_joint).

Cross-entropy on image tokens and flow matching on latents, in one backward pass through both, as the published
recipe does. The condition is dropped for a tenth of the examples, which is what guidance needs.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from .captions import caption
from .edits import random_edit
from .embedded_model import EmbeddedModel
from .image_tokenizer import ImageTokenizer
from .model_config import TOKENS_PER_IMAGE
from .render import render_batch
from .scene import Scene, training_scene
from .tokenizer import PromptTokenizer, save_tokenizer
from .train_autoencoder import build_autoencoder
from .training import Log, WeightAverage, finished_module, load_state, save_atomically

DROP_SHARE = 0.1
SHAPE_CELL_WEIGHT = 3.0  # of a latent cell that a shape touches: most cells are plain background
WARMUP_STEPS = 100
DECAY_SHARE = 0.25  # of the steps at the end, in which the learning rate falls to a twentieth


@dataclass
class Batch:
    """Token ids right-padded [N, L], where <S0> stands [N], latents and the weight of their cells."""

    ids: torch.Tensor
    starts: torch.Tensor
    latents: torch.Tensor  # [N, C, h, w]
    cell_weight: torch.Tensor  # [N, 1, h, w]
    reference: torch.Tensor | None  # [N, C, h, w] of an edit


class FrozenStages:
    """The finished autoencoder and image tokenizer, and the scale that gives latents unit variance."""

    def __init__(self, run: Path) -> None:
        self.autoencoder = finished_module(build_autoencoder(), run / "autoencoder.pt")
        self.image_tokenizer = finished_module(ImageTokenizer(), run / "image_tokenizer.pt")
        rng = random.Random(3)
        scenes = [training_scene(rng) for _ in range(256)]
        self.scaling_factor = 1.0
        self.scaling_factor = round(1 / float(self.latents(render_batch(scenes)[0]).std()), 5)

    @torch.no_grad()
    def latents(self, pictures: torch.Tensor) -> torch.Tensor:
        """Scaled latents [N, C, h, w] of pictures in [0, 1]."""
        return self.autoencoder.encode(pictures * 2 - 1).latent * self.scaling_factor

    @torch.no_grad()
    def pictures(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures [N, 3, H, W] in [0, 1] of scaled latents."""
        return (self.autoencoder.decode(latents / self.scaling_factor).sample / 2 + 0.5).clamp(0, 1)


def make_batch(
    prompts: list[list[int]], scenes: list[Scene], before: list[Scene] | None, stages: FrozenStages, first_image_id: int
) -> Batch:
    """Appends the pictures' tokens to their prompts and encodes the pictures."""
    pictures, covered = render_batch(scenes)
    latents = stages.latents(pictures)
    images = stages.image_tokenizer.encode(pictures) + first_image_id
    starts = torch.tensor([len(prompt) - 1 for prompt in prompts])
    ids = torch.zeros(len(prompts), int(starts.max()) + 1 + TOKENS_PER_IMAGE, dtype=torch.int64)
    for row, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
        ids[row, : len(prompt)] = torch.tensor(prompt)
        ids[row, len(prompt) : len(prompt) + TOKENS_PER_IMAGE] = image
    touched = (F.adaptive_max_pool2d(covered, latents.shape[-1]) > 0).float()
    reference = None if before is None else stages.latents(render_batch(before)[0])
    return Batch(ids, starts, latents, 1 + (SHAPE_CELL_WEIGHT - 1) * touched, reference)


def caption_batch(rng: random.Random, count: int, tokenizer: PromptTokenizer, stages: FrozenStages) -> Batch:
    """Captions and their scenes."""
    scenes = [training_scene(rng) for _ in range(count)]
    prompts = [tokenizer.text_to_image(caption(scene, rng)) for scene in scenes]
    return make_batch(prompts, scenes, None, stages, tokenizer.first_image_id)


def edit_batch(rng: random.Random, count: int, tokenizer: PromptTokenizer, stages: FrozenStages) -> Batch:
    """Edit instructions with the scenes before and after."""
    edits = [random_edit(rng) for _ in range(count)]
    before = [edit.before for edit in edits]
    codes = stages.image_tokenizer.encode(render_batch(before)[0]).tolist()
    prompts = [tokenizer.edit(edit.instruction, code) for edit, code in zip(edits, codes, strict=True)]
    return make_batch(prompts, [edit.after for edit in edits], before, stages, tokenizer.first_image_id)


def joint_loss(model: EmbeddedModel, batch: Batch, noises: int) -> dict[str, torch.Tensor]:
    """Cross-entropy, share of right tokens, and the flow loss over several noises per example."""
    with torch.autocast("cpu", torch.bfloat16):
        states = model.language_model.model(input_ids=batch.ids, use_cache=False).last_hidden_state
        places = batch.starts[:, None] + torch.arange(TOKENS_PER_IMAGE + 1)
        hidden = states.gather(1, places[:, :, None].expand(-1, -1, states.shape[-1]))
        logits = model.language_model.lm_head(hidden[:, :-1]).float()
        target = batch.ids.gather(1, places[:, 1:])
        dropped = torch.rand(len(hidden), 1, 1) < DROP_SHARE
        given, null = model.condition(hidden, batch.reference), model.null_condition(hidden, batch.reference)
        condition = torch.where(dropped, null, given)
        data = batch.latents.repeat(noises, 1, 1, 1)
        noise = torch.randn_like(data)
        sigma = (torch.randperm(len(data)) + torch.rand(len(data))) / len(data)  # stratified over [0, 1]
        noisy = data + sigma[:, None, None, None] * (noise - data)
        reference = None if batch.reference is None else batch.reference.repeat(noises, 1, 1, 1)
        predicted = model.velocity(noisy, sigma, condition.repeat(noises, 1, 1), reference).float()
    weight = batch.cell_weight.repeat(noises, 1, 1, 1)
    error = ((predicted - (noise - data)).square() * weight).sum() / (weight.sum() * data.shape[1])
    right = (logits.argmax(-1) == target).float().mean()
    return {"tokens": F.cross_entropy(logits.flatten(0, 1), target.flatten()), "flow": error, "right": right}


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm-up, a plateau, and a linear fall at the end; raising steps later goes on from the plateau."""
    fall = (steps - step) / (DECAY_SHARE * steps)
    return peak * min(1.0, (step + 1) / WARMUP_STEPS, max(0.05, fall))


def averaged_state(model: EmbeddedModel, average: WeightAverage) -> dict[str, torch.Tensor]:
    """The model's state dictionary with averaged weights."""
    average.swap()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    average.swap()
    return state


def train(run: Path, steps: int, batch: int, noises: int, peak: float, seed: int) -> None:
    """Runs or resumes the stage; leaves run/joint.pt."""
    path = run / "joint.pt"
    if not (run / "tokenizer" / "tokenizer.json").exists():
        save_tokenizer(run / "tokenizer")
    tokenizer, stages = PromptTokenizer(run / "tokenizer"), FrozenStages(run)
    torch.manual_seed(seed)
    model = EmbeddedModel(tokenizer.vocab_size).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    average = WeightAverage([model], 0.998)
    first = 0
    if (state := load_state(path)) is not None:
        first = state["step"]
        model.load_state_dict(state["weights"])
        optimiser.load_state_dict(state["optimiser"])
        average.average = state["average"]
    log = Log(run / "joint.jsonl", every=50)
    for step in range(first, steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        rng = random.Random(seed * 1_000_003 + step)
        torch.manual_seed(seed * 1_000_003 + step)
        optimiser.zero_grad(set_to_none=True)
        report = {}
        edits = batch // 3
        makers = {"caption": (caption_batch, batch - edits), "edit": (edit_batch, edits)}
        for name, (make, count) in makers.items():
            losses = joint_loss(model, make(rng, count, tokenizer, stages), noises)
            ((losses["tokens"] + losses["flow"]) * (count / batch)).backward()
            report |= {f"{name}_{key}": float(value.detach()) for key, value in losses.items()}
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        average.update(step)
        log.add(step, report)
        if (step + 1) % 200 == 0 or step + 1 == steps:
            save_atomically(
                {
                    "step": step + 1,
                    "model": averaged_state(model, average),
                    "weights": model.state_dict(),
                    "optimiser": optimiser.state_dict(),
                    "average": average.average,
                },
                path,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of training states and logs")
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=48, help="examples per step, a third of them edits")
    parser.add_argument("--noises", type=int, default=2, help="noise levels per example and step")
    parser.add_argument("--peak", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=3)
    arguments = parser.parse_args()
    train(
        arguments.run, arguments.steps, arguments.batch, arguments.noises, arguments.peak, arguments.seed
    )


if __name__ == "__main__":
    main()
