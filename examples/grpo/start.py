"""Where GRPO starts: the shipped decoder after some training on captions that are often wrong.

The shipped model leaves a reward little to teach. Here a stated share of the captions are wrong: the image
shows one property replaced by its opposite. A model that learned of them draws what it is asked, or what it
saw. Only the decoder is trained, and briefly: the frozen diffusion transformer must still read its states.
"""

from __future__ import annotations

import argparse
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3ForCausalLM

from blip3o_rt.embedded import embedded_checkpoint
from blip3o_rt.measure.shapes.captions import caption
from blip3o_rt.measure.shapes.edits import random_edit
from blip3o_rt.measure.shapes.render import render_batch
from blip3o_rt.measure.shapes.scene import (
    BACKGROUNDS,
    COLOURS,
    KINDS,
    PLACES,
    SIZES,
    Scene,
    is_drawable,
    is_held_out,
    training_scene,
)
from examples.shapes.import_checkpoint import import_checkpoint
from examples.shapes.reference_pipeline import ReferencePipeline
from examples.shapes.train_joint import Batch, make_batch, token_loss

PROPERTIES = {"colour": COLOURS, "kind": KINDS, "size": SIZES, "place": PLACES}
WEIGHTS = "model.safetensors"
EVERY = 20  # steps between two lines of the log
WARM_UP = 10  # steps


def opposite(values: Sequence[str], value: str) -> str:
    """What replaces a value: the one as far from the end of the list as it is from the beginning."""
    return values[~values.index(value)]


def mistaken(scene: Scene, rng: random.Random) -> Scene:
    """The scene with one property replaced, the background's color or one of a shape's.

    It is drawable and not held out. An empty orange scene, which has no opposite, stays.
    """
    found = [replace(scene, background=opposite(BACKGROUNDS, scene.background))]
    for index, shape in enumerate(scene.shapes):
        for name, values in PROPERTIES.items():
            other = opposite(values, getattr(shape, name))
            found.append(scene.with_shape(index, replace(shape, **{name: other})))
    fitting = [one for one in found if one != scene and is_drawable(one) and not is_held_out(one)]
    return rng.choice(fitting or [scene])


def noisy_batches(
    rng: random.Random, count: int, share: float, reference: ReferencePipeline
) -> tuple[Batch, Batch]:
    """Captions and as many edits; the given share of their images are mistaken."""

    def shown(scene: Scene) -> Scene:
        return mistaken(scene, rng) if rng.random() < share else scene

    tokenizer = reference.tokenizer
    scenes = [training_scene(rng) for _ in range(count)]
    captions = [tokenizer.text_to_image(caption(scene, rng)) for scene in scenes]
    edits = [random_edit(rng) for _ in range(count)]
    codes = reference.image_tokenizer.encode(render_batch([edit.before for edit in edits])[0]).tolist()
    instructions = [tokenizer.edit(edit.instruction, seen) for edit, seen in zip(edits, codes, strict=True)]
    first = tokenizer.first_image_id
    return (
        make_batch(captions, [shown(scene) for scene in scenes], None, first),
        make_batch(instructions, [shown(edit.after) for edit in edits], None, first),
    )


def make_start(arguments: argparse.Namespace, write: Callable[..., None]) -> None:
    """Train the shipped decoder at a learning rate that falls to zero, and write the start's checkpoint."""
    import_checkpoint(embedded_checkpoint(), arguments.out / "run")
    reference = ReferencePipeline(arguments.out / "run")
    decoder = reference.model.language_model.requires_grad_()
    steps, peak = arguments.start_steps, arguments.start_rate
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = peak * min((step + 1) / WARM_UP, (steps - step) / steps)
        rng = random.Random(f"start {arguments.seed} {step}")
        total = 0.0
        for one in noisy_batches(rng, arguments.start_batch // 2, arguments.wrong, reference):
            loss = token_loss(reference.model, one)[0]["tokens"] / 2
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % EVERY == 0:
            write(start=step + 1, loss=total)
    write_checkpoint(decoder, arguments.out / "start")


def write_checkpoint(decoder: Qwen3ForCausalLM, folder: Path) -> None:
    """Write the embedded model with this decoder as a checkpoint in the published layout, bfloat16."""
    embedded, partial = embedded_checkpoint(), folder.with_name(folder.name + ".partial")
    for old in (partial, folder):
        shutil.rmtree(old, ignore_errors=True)
    shutil.copytree(embedded, partial, ignore=shutil.ignore_patterns("*.py", "__pycache__", WEIGHTS))
    tensors = load_file(embedded / WEIGHTS)
    tensors |= {name: t.detach().to(torch.bfloat16) for name, t in decoder.state_dict().items()}
    save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
    partial.rename(folder)
