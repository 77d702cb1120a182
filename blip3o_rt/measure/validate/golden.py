"""Recorded runs of the published code: a checkpoint, and the tensors and the image it gave, in float32.

DIR/checkpoint; DIR/golden.safetensors with gen_ids, prompt_ids, hidden, noise, timesteps, first_in,
first_noise_pred, last_noise_pred and latents, of an edit also ref_latents, siglip_pixels, und_feats and
und_tokens; DIR/golden.png and, of an edit, DIR/input.png. Tokens that were sampled are replayed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from blip3o_rt.checkpoint.load import Checkpoint, load_checkpoint
from blip3o_rt.dit.model import DiT
from blip3o_rt.dit.schedule import flow_schedule
from blip3o_rt.errors import CheckpointError
from blip3o_rt.images import load_reference, tower_pixels
from blip3o_rt.machine import exact_arithmetic
from blip3o_rt.measure.baselines.published import levels
from blip3o_rt.measure.validate.bounds import equal_line, tensor_line
from blip3o_rt.measure.validate.dit import condition_of
from blip3o_rt.measure.validate.images import Compared, image_lines
from blip3o_rt.measure.validate.line import Line
from blip3o_rt.params import DiffusionParams
from blip3o_rt.pipeline import Pipeline
from blip3o_rt.result import Plan
from blip3o_rt.tatok.model import ImageTokenizer
from blip3o_rt.vae.model import Autoencoder

REQUIRED = ("gen_ids", "prompt_ids", "hidden", "noise", "timesteps", "first_noise_pred", "latents")
PROMPTS = (r"following caption: (.*?)<\|im_end\|>", r"following instruction: (.*?)\.\n<\|vision_start\|>")
GUIDANCE = DiffusionParams().guidance


class Recording:
    """A folder of recorded results. Raises CheckpointError where a file or tensor is missing."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.checkpoint = folder, folder / "checkpoint"
        for path in (self.checkpoint, folder / "golden.safetensors", folder / "golden.png"):
            if not path.exists():
                raise CheckpointError(
                    f"{path} does not exist: a recording has checkpoint/, golden.safetensors and golden.png"
                )
        try:
            self.tensors = load_file(folder / "golden.safetensors")
        except SafetensorError as error:
            raise CheckpointError(f"{folder / 'golden.safetensors'}: {error}") from None
        missing = [name for name in REQUIRED if name not in self.tensors]
        if missing:
            raise CheckpointError(f"{folder / 'golden.safetensors'} has no {', '.join(missing)}")
        self.image = folder / "input.png" if (folder / "input.png").is_file() else None

    @property
    def prompt(self) -> str:
        """The words of the recorded prompt. Raises CheckpointError where it is not worded as published."""
        tokenizer = PreTrainedTokenizerFast.from_pretrained(self.checkpoint, local_files_only=True)
        text = str(tokenizer.decode(self.tensors["prompt_ids"][0]))
        found = re.search(PROMPTS[self.image is not None], text, re.DOTALL)
        if found is None:
            raise CheckpointError(f"{self.folder}: the recorded prompt is not worded as published: {text!r}")
        return found[1]

    @property
    def steps(self) -> int:
        return len(self.tensors["timesteps"])

    @property
    def tokens(self) -> Tensor:
        return self.tensors["gen_ids"][:, self.tensors["prompt_ids"].shape[1] :]


def golden_lines(recording: Recording, device: torch.device, compared: Compared) -> Iterator[Line | str]:
    """Every recorded result against ours, in float32."""
    checkpoint = load_checkpoint(recording.checkpoint, dtype=torch.float32, device=device)
    pipeline = Pipeline(checkpoint, max_batch=1)
    pipeline.warm_up()
    prompt, tokens = recording.prompt, recording.tokens
    if _is_greedy(recording, checkpoint):
        plan = pipeline.plan(prompt, image=recording.image, top_k=1)
        yield equal_line("golden", "greedy tokens", "fp32", plan.token_ids, tokens, why="the likeliest token")
        yield _line("hidden states, token by token", plan.hidden_states, recording.tensors["hidden"])
    else:
        yield "golden: the recorded tokens were sampled, so they are replayed"
    plan = pipeline.plan(prompt, image=recording.image, token_ids=tokens)
    expected_ids = recording.tensors["prompt_ids"]
    yield equal_line("golden", "prompt ids", "fp32", plan.prompt_ids, expected_ids, why="the same tokenizer")
    yield _line("hidden states, replayed", plan.hidden_states, recording.tensors["hidden"])
    with exact_arithmetic(device):
        if recording.image is not None:
            yield from _reference_lines(recording, checkpoint, plan)
        yield from _prediction_lines(recording, checkpoint)
    yield from _image_lines(recording, checkpoint, pipeline, plan, compared)


def _line(name: str, found: Tensor, expected: Tensor) -> Line:
    return tensor_line("golden", name, "fp32", found, expected, None)


def _is_greedy(recording: Recording, checkpoint: Checkpoint) -> bool:
    """Whether every recorded token is the likeliest after the recorded hidden state before it."""
    ar, image_tokens = checkpoint.weights["ar"], checkpoint.config.image_tokens.image_token_range
    head = ar.get("lm_head.weight", ar["embed_tokens.weight"])[image_tokens.start : image_tokens.stop]
    scores = recording.tensors["hidden"][0, :-1].to(head) @ head.T
    likeliest = image_tokens.start + scores.argmax(dim=1).cpu()
    return bool(torch.equal(likeliest[None], recording.tokens))


def _reference_lines(recording: Recording, checkpoint: Checkpoint, plan: Plan) -> Iterator[Line]:
    """What an edit takes from its image, as far as it was recorded."""
    tensors, config = recording.tensors, checkpoint.config.ta_tok
    for found, name in zip(plan.reference_latents, ("ref_latents",), strict=False):
        if name in tensors:
            yield _line("reference latent", found, tensors[name])
    if config is None or recording.image is None or "siglip_pixels" not in tensors:
        return
    pixels = tower_pixels(load_reference(recording.image), config.image_size)
    yield _line("image to pixels", pixels, tensors["siglip_pixels"])
    features, codes = ImageTokenizer(config, checkpoint.weights["ta_tok"]).encode(tensors["siglip_pixels"])
    yield _line("TA-Tok features", features, tensors["und_feats"])
    ids = checkpoint.config.image_tokens.image_token_range.start + codes[0]
    yield equal_line("golden", "TA-Tok codes", "fp32", ids, tensors["und_tokens"], why="the nearest code")


def _prediction_lines(recording: Recording, checkpoint: Checkpoint) -> Iterator[Line]:
    """The schedule, and predictions at the first and the last step from the recorded hidden states."""
    tensors, config, weights = recording.tensors, checkpoint.config, checkpoint.weights
    device = checkpoint.device
    schedule = flow_schedule(config.scheduler, recording.steps)
    yield _line("timesteps", schedule.timesteps, tensors["timesteps"])
    looks = config.edit.use_und_image_vae and "ref_latents" in tensors
    tokens = condition_of(checkpoint, tensors["hidden"][0], tensors["ref_latents"] if looks else None)
    dit = DiT(config.dit, weights["dit"])
    condition, tables = dit.condition(tokens), dit.schedule_tables(schedule)
    first = dit.predict(tensors["first_in"][:1].to(device), tables.step(0), condition)
    yield _line("prediction, first step", first, tensors["first_noise_pred"])
    if "last_noise_pred" in tensors and config.dit.in_channels == config.vae.latent_channels:
        latent = _last_input(tensors, float(schedule.delta_sigmas[-1])).to(device)
        last = dit.predict(latent, tables.step(recording.steps - 1), condition)
        yield _line("prediction, last step", last, tensors["last_noise_pred"])


def _last_input(tensors: Mapping[str, Tensor], delta_sigma: float) -> Tensor:
    """What the model saw at the last step: the recorded step to the final latent, undone."""
    null, conditional = tensors["last_noise_pred"].chunk(2)
    guided = null + GUIDANCE * (conditional - null)
    latent = tensors["latents"] - delta_sigma * guided[..., : tensors["latents"].shape[3]]
    beside = guided.shape[3] > latent.shape[3]
    return torch.cat([latent, tensors["ref_latents"]], dim=3) if beside else latent


def _image_lines(
    recording: Recording, checkpoint: Checkpoint, pipeline: Pipeline, plan: Plan, compared: Compared
) -> Iterator[Line]:
    """The final latent from the recorded noise, and the image."""
    noise, steps = recording.tensors["noise"], recording.steps
    latent = torch.as_tensor(
        pipeline.render(plan, noise=noise, steps=steps, guidance=GUIDANCE, output="latent")
    )
    yield _line(f"latent after {steps} steps", latent, recording.tensors["latents"])
    with exact_arithmetic(checkpoint.device):
        pixels = Autoencoder(checkpoint.config.vae, checkpoint.weights["vae"]).decode(latent)
    with Image.open(recording.folder / "golden.png") as image:
        expected = np.asarray(image.convert("RGB"))
    likeness = compared(f"golden {recording.folder.name}", levels(pixels), expected)
    yield from image_lines("golden", "image", "fp32", likeness, None)
