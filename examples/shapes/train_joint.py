"""Stage 3: trains the decoder and the diffusion transformer together (python -m examples.shapes.train_joint).

Cross-entropy on image tokens and flow matching on latents, in one backward pass through both, as the
published recipe does. The condition is dropped for a tenth of the examples, which is what guidance needs.
Of as many edits again the decoder alone learns the tokens: which shape an instruction means comes slowest,
and costs little to practise. The first steps train the decoder alone: until it has read the prompts the
transformer can learn nothing.

The tokens to write are the scenes' own codes, which the image tokenizer of stage 2 is trained to give; an
edit's reference is what that tokenizer really sees, as soon as it is finished.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from blip3o_rt.measure.shapes.captions import caption
from blip3o_rt.measure.shapes.codes import TOKENS_PER_IMAGE, scene_codes
from blip3o_rt.measure.shapes.edits import Edit, random_edit
from blip3o_rt.measure.shapes.render import render_batch
from blip3o_rt.measure.shapes.scene import Scene, training_scene

from .auxiliary_heads import AuxiliaryHeads
from .embedded_model import EmbeddedModel
from .foreign import draw_mixed
from .image_tokenizer import ImageTokenizer
from .latents import Latents, wait_for_encoder
from .tokenizer import PromptTokenizer, save_tokenizer
from .training import SAVE_EVERY, Log, WeightAverage, autocast, finished_module, load_state, save_atomically

DROP_SHARE = 0.1
SHAPE_CELL_WEIGHT = 3.0  # of a latent cell that a shape touches: most cells are plain background
EDIT_DRAWS = {
    "move": 3,
    "remove": 3,
    "recolour": 3,
    "background": 1,
    "add": 1,
    "keep": 1,
}  # hard kinds more often
REDRAWN_SHARE = 0.7  # of the edits of single shapes: which of two is meant comes slowest
HEAD_WEIGHTS = {"index": 0.3, "place": 0.1, "shown": 0.1}  # against flow matching
WARMUP_STEPS = 100
DECAY_SHARE = 0.25  # of the steps at the end, in which the learning rate falls to a twentieth


@dataclass
class Batch:
    """Token ids right-padded [N, L], where <S0> stands [N], the scenes to show, and the images to edit.

    References are [N, 3, H, W] in [0, 1]. Of a batch that is not drawn the decoder alone learns.
    """

    ids: torch.Tensor
    starts: torch.Tensor
    scenes: list[Scene]
    references: torch.Tensor | None
    drawn: bool = True


def make_batch(
    prompts: list[list[int]], scenes: list[Scene], references: torch.Tensor | None, first_image_id: int
) -> Batch:
    """Appends the scenes' image tokens to their prompts."""
    starts = torch.tensor([len(prompt) - 1 for prompt in prompts])
    ids = torch.zeros(len(prompts), int(starts.max()) + 1 + TOKENS_PER_IMAGE, dtype=torch.int64)
    for row, (prompt, scene) in enumerate(zip(prompts, scenes, strict=True)):
        tokens = [*prompt, *(code + first_image_id for code in scene_codes(scene))]
        ids[row, : len(tokens)] = torch.tensor(tokens)
    return Batch(ids, starts, scenes, references)


def caption_batch(rng: random.Random, count: int, tokenizer: PromptTokenizer) -> Batch:
    """Captions and their scenes."""
    scenes = [training_scene(rng) for _ in range(count)]
    prompts = [tokenizer.text_to_image(caption(scene, rng)) for scene in scenes]
    return make_batch(prompts, scenes, None, tokenizer.first_image_id)


def hard_edit(rng: random.Random, kind: str) -> Edit:
    """An edit of a kind, of two shapes more often than of one."""
    edit = random_edit(rng, kind)
    return random_edit(rng, kind) if len(edit.before.shapes) < 2 and rng.random() < REDRAWN_SHARE else edit


def edit_batch(
    rng: random.Random, count: int, tokenizer: PromptTokenizer, eyes: ImageTokenizer | None, foreign: float
) -> Batch:
    """Edit instructions with the scenes before (as the image tokenizer sees them, if given) and after.

    foreign is the share of references that somebody else drew.
    """
    kinds = rng.choices(list(EDIT_DRAWS), weights=list(EDIT_DRAWS.values()), k=count)
    edits = [hard_edit(rng, kind) for kind in kinds]
    before = [edit.before for edit in edits]
    references, _ = draw_mixed(before, round(foreign * count), rng)
    seen = [scene_codes(s) for s in before] if eyes is None else eyes.encode(references).tolist()
    prompts = [tokenizer.edit(edit.instruction, codes) for edit, codes in zip(edits, seen, strict=True)]
    return make_batch(prompts, [edit.after for edit in edits], references, tokenizer.first_image_id)


def token_loss(model: EmbeddedModel, batch: Batch) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Token losses, and the hidden states of <S0> and the image tokens [N, tokens + 1, H]."""
    with autocast():
        states = model.language_model.model(input_ids=batch.ids, use_cache=False).last_hidden_state
        places = batch.starts[:, None] + torch.arange(TOKENS_PER_IMAGE + 1)
        hidden = states.gather(1, places[:, :, None].expand(-1, -1, states.shape[-1]))
        logits = model.language_model.lm_head(hidden[:, :-1]).float()
    target = batch.ids.gather(1, places[:, 1:])
    right = (logits.detach().argmax(-1) == target).float()
    loss = F.cross_entropy(logits.flatten(0, 1), target.flatten())
    return {"tokens": loss, "right": right.mean(), "grids": right.all(dim=1).float().mean()}, hidden


def flow_losses(
    model: EmbeddedModel,
    heads: AuxiliaryHeads,
    batch: Batch,
    hidden: torch.Tensor,
    stages: Latents,
    noises: int,
) -> dict[str, torch.Tensor]:
    """Flow-matching loss at several noise levels per example, and the auxiliary heads' losses.

    Cells that a shape touches weigh more in the flow-matching loss.
    """
    images, covered = render_batch(batch.scenes)
    data = stages.latents(images).repeat(noises, 1, 1, 1)
    reference = None if batch.references is None else stages.latents(batch.references)
    touched = (F.adaptive_max_pool2d(covered, data.shape[-1]) > 0).float()
    weight = (1 + (SHAPE_CELL_WEIGHT - 1) * touched).repeat(noises, 1, 1, 1)
    noise = torch.randn_like(data)
    sigma = (torch.randperm(len(data)) + torch.rand(len(data))) / len(data)  # stratified over [0, 1]
    noisy = data + sigma[:, None, None, None] * (noise - data)
    with autocast():
        dropped = torch.rand(len(hidden), 1, 1) < DROP_SHARE
        given, null = model.condition(hidden, reference), model.null_condition(hidden, reference)
        condition = torch.where(dropped, null, given).repeat(noises, 1, 1)
        beside = None if reference is None else reference.repeat(noises, 1, 1, 1)
        predicted = model.velocity(noisy, sigma, condition, beside).float()
    flow = ((predicted - (noise - data)).square() * weight).sum() / (weight.sum() * data.shape[1])
    codes = torch.tensor([scene_codes(scene) for scene in batch.scenes]).repeat(noises, 1)
    width = data.shape[-1] * (1 if reference is None else 2)
    return {"flow": flow, **heads.loss(given, codes, dropped.flatten().repeat(noises), width)}


def accumulate_gradients(
    model: EmbeddedModel,
    heads: AuxiliaryHeads,
    batches: dict[str, Batch],
    stages: Latents | None,
    noises: int,
    auxiliary: float,
) -> dict[str, float]:
    """Adds every batch's gradients, weighted by its size, and reports its losses by name.

    auxiliary scales the heads' losses.
    """
    report: dict[str, float] = {}
    examples = sum(len(batch.scenes) for batch in batches.values())
    for name, batch in batches.items():
        losses, hidden = token_loss(model, batch)
        loss = losses["tokens"]
        if stages is not None and batch.drawn:
            flow = flow_losses(model, heads, batch, hidden, stages, noises)
            scales = {name: weight * auxiliary for name, weight in HEAD_WEIGHTS.items()} | {"flow": 1.0}
            loss = loss + sum(scales[name] * value for name, value in flow.items())
            losses |= flow
        (loss * (len(batch.scenes) / examples)).backward()
        report |= {f"{name}_{key}": float(value.detach()) for key, value in losses.items()}
    return report


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm-up, a plateau, and a linear fall at the end; raising steps later goes on from the plateau."""
    fall = (steps - step) / (DECAY_SHARE * steps)
    return peak * min(1.0, (step + 1) / WARMUP_STEPS, max(0.05, fall))


def finished_tokenizer(run: Path) -> ImageTokenizer | None:
    """The image tokenizer of stage 2, or None while it is missing or still training."""
    state = load_state(run / "image_tokenizer.pt")
    if state is None or not state.get("finished", False):
        return None
    return finished_module(ImageTokenizer(), run / "image_tokenizer.pt")


def averaged_state(model: EmbeddedModel, average: WeightAverage) -> dict[str, torch.Tensor]:
    """The model's state dictionary with averaged weights."""
    average.swap()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    average.swap()
    return state


def train(
    run: Path,
    steps: int,
    token_steps: int,
    batch: int,
    noises: int,
    peak: float,
    seed: int,
    plans: int | None = None,
    decoder_alone: bool = False,
    foreign: float = 0.0,
    auxiliary: float = 1.0,
) -> None:
    """Runs or resumes the stage; leaves run/joint.pt.

    plans: edits of which the decoder alone learns. decoder_alone: the transformer and the connectors stay as
    they are, and only say what hidden states they can draw.
    """
    path = run / "joint.pt"
    if not (run / "tokenizer" / "tokenizer.json").exists():
        save_tokenizer(run / "tokenizer")
    tokenizer, stages, eyes = PromptTokenizer(run / "tokenizer"), None, None
    torch.manual_seed(seed)
    model = EmbeddedModel(tokenizer.vocab_size).train()
    if decoder_alone:
        for part in (model.sana, model.diffusion_connector, model.und_image_vae_connector):
            part.requires_grad_(False)
    heads = AuxiliaryHeads(model)
    parameters = [p for p in (*model.parameters(), *heads.parameters()) if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    average = WeightAverage([model], 0.998)
    first = 0
    if (state := load_state(path)) is not None:
        first = state["step"]
        model.load_state_dict(state["weights"])
        if first:  # an imported state has the weights alone
            heads.load_state_dict(state["heads"])
            optimiser.load_state_dict(state["optimiser"])
        average.average = state["average"] if first else [p.detach().clone() for p in model.parameters()]
    log = Log(run / "joint.jsonl", every=50)
    for step in range(first, steps):
        if step >= token_steps and stages is None:  # before the seeding: making modules draws random numbers
            wait_for_encoder(run)
            stages = Latents(run)
            eyes = finished_tokenizer(run)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        rng = random.Random(seed * 1_000_003 + step)
        torch.manual_seed(seed * 1_000_003 + step)
        optimiser.zero_grad(set_to_none=True)
        edits = batch // 2
        batches = {
            "caption": caption_batch(rng, batch - edits, tokenizer),
            "edit": edit_batch(rng, edits, tokenizer, eyes, foreign),
            "plan": replace(edit_batch(rng, plans or batch, tokenizer, eyes, foreign), drawn=False),
        }
        report = accumulate_gradients(model, heads, batches, stages, noises, auxiliary)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        average.update(step)
        log.add(step, report)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            save_atomically(
                {
                    "step": step + 1,
                    "model": averaged_state(model, average),
                    "weights": model.state_dict(),
                    "heads": heads.state_dict(),
                    "optimiser": optimiser.state_dict(),
                    "average": average.average,
                },
                path,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of training states and logs")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--token-steps", type=int, default=200, help="steps that train the decoder alone")
    parser.add_argument("--batch", type=int, default=32, help="examples per step, half of them edits")
    parser.add_argument("--plans", type=int, help="edits per step besides, of which the decoder alone learns")
    parser.add_argument("--decoder-alone", action="store_true", help="let only the decoder learn")
    parser.add_argument("--noises", type=int, default=4, help="noise levels per example and step")
    parser.add_argument("--peak", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--foreign", type=float, default=0.5, help="share of references that others drew")
    parser.add_argument("--auxiliary", type=float, default=1.0, help="scale of the auxiliary heads' losses")
    arguments = parser.parse_args()
    train(
        arguments.run,
        arguments.steps,
        arguments.token_steps,
        arguments.batch,
        arguments.noises,
        arguments.peak,
        arguments.seed,
        arguments.plans,
        arguments.decoder_alone,
        arguments.foreign,
        arguments.auxiliary,
    )


if __name__ == "__main__":
    main()
