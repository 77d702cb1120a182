"""GRPO of the embedded model's decoder: rollouts by blip3o_rt, training in transformers, rewards from pixels.

    python -m examples.grpo.train --steps 100 --out out/grpo

The published recipe (arXiv 2510.15857): advantages relative to the group of samples of a prompt, and only the
autoregressive stage learns. What is left out of it: its rollout has no attention mask and no filters, which
makes log-probabilities of another distribution than the one that was drawn from.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from blip3o_rt.embedded import embedded_checkpoint
from blip3o_rt.measure.shapes import judge as judges
from blip3o_rt.measure.shapes.captions import caption
from blip3o_rt.measure.shapes.scene import Scene, is_held_out, random_scene, training_scene
from blip3o_rt.pipeline import Pipeline
from blip3o_rt.rl.rollout import Rollout

CLIP = 0.2  # of the ratio of new to old probability
DRAWING = {"steps": 8, "top_k": 0, "top_p": 1.0}  # all of the distribution that the trainer computes


@dataclass(frozen=True)
class Task:
    """A prompt, and the scene that its image must show."""

    prompt: str
    scene: Scene


def tasks(count: int, seed: int, *, held_out: bool = False) -> list[Task]:
    """Prompts of two shapes; held-out ones have a combination that training never sees."""
    rng, found = random.Random(seed), []
    while len(found) < count:
        scene = random_scene(rng, 2) if held_out else training_scene(rng, 2)
        if is_held_out(scene) == held_out:
            found.append(Task(caption(scene, rng, complete=True), scene))
    return found


def reward(rollout: Rollout, task: Task) -> float:
    """The share of the properties that are right, and as much again where all are."""
    assert rollout.image is not None
    image = Image.fromarray(rollout.image.permute(1, 2, 0).numpy())
    verdict = judges.judge(judges.read_image(image), task.scene)
    right = list(vars(verdict).values())
    return sum(right) / len(right) / 2 + verdict.right / 2


def embedded_decoder() -> Qwen3ForCausalLM:
    """transformers' module of the embedded model's decoder, float32."""
    folder = embedded_checkpoint()
    fields = json.loads((folder / "config.json").read_text())
    model = Qwen3ForCausalLM(Qwen3Config.from_dict({**fields, "model_type": "qwen3"})).float()
    state = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    model.load_state_dict(state, strict=False)
    return model


def log_probs(model: Qwen3ForCausalLM, rollouts: Sequence[Rollout]) -> Tensor:
    """[samples, T]: the tokens' log-probabilities in a forward pass of samples of one prompt."""
    tokens = torch.stack([rollout.token_ids for rollout in rollouts])
    prompts = torch.stack([rollout.prompt_ids for rollout in rollouts])
    logits = model(torch.cat([prompts, tokens], dim=1)).logits[:, prompts.shape[1] - 1 : -1]
    return logits.log_softmax(-1).gather(2, tokens[..., None])[..., 0]


def advantages(rewards: Tensor) -> Tensor:
    """[samples]: how much better than the group's mean, in its standard deviations."""
    return (rewards - rewards.mean()) / (rewards.std() + 1e-4)


def loss_of(new: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
    """The clipped objective, averaged over tokens and samples."""
    ratio = (new - old).exp()
    gain = torch.minimum(ratio * advantage[:, None], ratio.clamp(1 - CLIP, 1 + CLIP) * advantage[:, None])
    return -gain.mean()


def evaluate(pipe: Pipeline, asked: list[Task], seed: int) -> tuple[float, float]:
    """The mean reward of one sample of each prompt, and half of its 95% interval."""
    rollouts = pipe.rollout([task.prompt for task in asked], 1, seed, **DRAWING)
    rewards = torch.tensor([reward(one, task) for one, task in zip(rollouts, asked, strict=True)])
    return float(rewards.mean()), 1.96 * float(rewards.std()) / math.sqrt(len(asked))


def train(arguments: argparse.Namespace) -> None:
    """Train, and write a line of numbers for every step and evaluation."""
    torch.manual_seed(arguments.seed)
    pipe = Pipeline.load(device="cpu", dtype="fp32", max_batch=16)
    model = embedded_decoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, weight_decay=0.0)
    unseen = tasks(arguments.evaluate, seed=10**6, held_out=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    with (arguments.out / "log.jsonl").open("w") as log:

        def write(**fields: float) -> None:
            print(json.dumps(fields), file=log, flush=True)
            print("  ".join(f"{name} {value:.4g}" for name, value in fields.items()), flush=True)

        mean, half = evaluate(pipe, unseen, 10**6)
        write(step=0, held_out=mean, interval=half)
        for step in range(1, arguments.steps + 1):
            asked = tasks(arguments.prompts, seed=arguments.seed * 10**6 + step)
            begin = time.perf_counter()
            rollouts = pipe.rollout(
                [task.prompt for task in asked], arguments.samples, step * 1000, **DRAWING
            )
            drawn = time.perf_counter()
            groups = [
                rollouts[first : first + arguments.samples]
                for first in range(0, len(rollouts), arguments.samples)
            ]
            rewards = torch.tensor(
                [[reward(one, task) for one in group] for group, task in zip(groups, asked, strict=True)]
            )
            for group, gained in zip(groups, rewards, strict=True):
                old = torch.stack([one.logprobs for one in group])
                loss = loss_of(log_probs(model, group), old, advantages(gained)) / len(groups)
                loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            pipe.update_weights(model.named_parameters())
            spent = time.perf_counter() - drawn
            write(step=step, reward=float(rewards.mean()), rollouts=drawn - begin, training=spent)
        mean, half = evaluate(pipe, unseen, 10**6)
        write(step=arguments.steps, held_out=mean, interval=half)
    model.save_pretrained(arguments.out / "decoder")


def main() -> None:
    """Parse the arguments and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--prompts", type=int, default=4, help="a step")
    parser.add_argument("--samples", type=int, default=8, help="of a prompt")
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--evaluate", type=int, default=200, help="held-out prompts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/grpo"))
    train(parser.parse_args())


if __name__ == "__main__":
    main()
