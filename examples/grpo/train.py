"""GRPO of the embedded model's decoder: rollouts by blip3o_rt, training in transformers, rewards from pixels.

    python -m examples.grpo.train --out out/grpo

Advantages relative to a prompt's group of samples are those of arXiv 2510.15857. Only the decoder learns, as
there. The published rollout runs each sequence a second time for its hidden states; this one keeps them as it
samples. README.md names what is chosen here.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.optim import Optimizer
from transformers import Qwen3ForCausalLM

from blip3o_rt.errors import Blip3oError, OpError, ParameterError
from blip3o_rt.measure.shapes.captions import caption
from blip3o_rt.measure.shapes.contact_sheet import contact_sheet
from blip3o_rt.measure.shapes.edits import EDIT_KINDS, random_edit
from blip3o_rt.measure.shapes.scene import is_held_out, random_scene, training_scene
from blip3o_rt.measure.shapes.score import NOTHING, Z_95, Drawn, judge_task, wilson_interval
from blip3o_rt.measure.shapes.tasks import Task
from blip3o_rt.metadata import save_png
from blip3o_rt.ops import native
from blip3o_rt.pipeline import ImageRequest, Pipeline
from blip3o_rt.rl.rollout import Rollout
from examples.grpo.outcome import draw_curves, summarize
from examples.grpo.published import PublishedRollouts
from examples.grpo.start import make_start, write_checkpoint
from examples.shapes.import_checkpoint import import_checkpoint
from examples.shapes.reference_pipeline import ReferencePipeline
from examples.shapes.training import load_state, save_atomically

CLIP = 0.2  # of the ratio of new to old probability
AGREEMENT = 1e-4  # of the log-probabilities of rollouts and trainer
EVALUATION_SEED = 10**6
ON_THE_SHEET = 10  # images of each category
UNSEEN = dict.fromkeys(("two", "edit"), "combinations that training never saw")
SAVE_EVERY = 20  # steps
# All of the distribution, as the trainer computes it, and as many steps as the judge needs.
DRAWING: dict[str, Any] = {"steps": 4, "top_k": 0, "top_p": 1.0}
DEFAULT_STEPS = 30  # of inference
Groups = list[list[Rollout]]  # the samples of each prompt


def tasks(count: int, seed: int, *, held_out: bool = False) -> list[Task]:
    """Captions of two shapes and edits in turns, every kind of edit as often.

    Those of `held_out` show a combination of color, shape and background that training never sees, an edit
    before or after it; the others show none.
    """
    rng, found = random.Random(f"{seed} {held_out}"), list[Task]()
    kinds = rng.sample(list(EDIT_KINDS), len(EDIT_KINDS))
    while len(found) < count:
        own_seed, edit = seed + len(found), None
        if len(found) % 2:
            edit = random_edit(rng, kinds[len(found) // 2 % len(kinds)], held_out)
            task = Task("edit", edit.instruction, own_seed, edit.after, edit)
        else:
            scene = random_scene(rng, 2) if held_out else training_scene(rng, 2)
            task = Task("two", caption(scene, rng, complete=True), own_seed, scene)
        scenes = [task.scene] if edit is None else [edit.before, edit.after]
        if any(map(is_held_out, scenes)) == held_out:
            found.append(task)
    return found


def judged(task: Task, rollout: Rollout) -> Drawn:
    """A rollout's image with what is right about it."""
    assert rollout.image is not None
    return judge_task(task, Image.fromarray(rollout.image.permute(1, 2, 0).numpy()), [], 0.0)


def reward(drawn: Drawn) -> float:
    """Half for the share of the properties that are right, half where all are."""
    right = [good for name, good in drawn.properties.items() if name not in ("plan", "right")]
    return sum(right) / len(right) / 2 + drawn.verdict.right / 2


def log_probs(model: Qwen3ForCausalLM, rollouts: Sequence[Rollout]) -> Tensor:
    """[samples, T]: the tokens' log-probabilities in a forward pass of samples of one prompt."""
    tokens = torch.stack([rollout.token_ids for rollout in rollouts])
    prompts = torch.stack([rollout.prompt_ids for rollout in rollouts])
    logits = model(torch.cat([prompts, tokens], dim=1)).logits[:, prompts.shape[1] - 1 : -1]
    return logits.log_softmax(-1).gather(2, tokens[..., None])[..., 0]


def advantages(rewards: Tensor) -> Tensor:
    """[prompts, samples]: how much better than the mean of its prompt, in standard deviations of it."""
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)


def loss_of(new: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
    """The clipped objective of [samples, T] log-probabilities, averaged over tokens and samples."""
    ratio = (new - old).exp()
    gain = torch.minimum(ratio * advantage[:, None], ratio.clamp(1 - CLIP, 1 + CLIP) * advantage[:, None])
    return -gain.mean()


def rollouts_of(pipe: Pipeline, asked: list[Task], samples: int, seed: int, images: bool = True) -> Groups:
    """So many samples of every task."""
    prompts, references = [task.prompt for task in asked], [task.reference for task in asked]
    flat = pipe.rollout(prompts, samples, seed, references=references, images=images, **DRAWING)
    return [flat[first : first + samples] for first in range(0, len(flat), samples)]


def check_agreement(model: Qwen3ForCausalLM, groups: Groups) -> float:
    """How far trainer and rollouts are apart. Raises ValueError for log-probabilities that do not agree."""
    with torch.no_grad():
        apart = [log_probs(model, group) - torch.stack([one.logprobs for one in group]) for group in groups]
    worst = max(float(one.abs().max()) for one in apart)
    if worst > AGREEMENT:
        raise ValueError(f"log-probabilities are {worst:.2g} apart: accepted are {AGREEMENT:g}")
    return worst


def update(model: Qwen3ForCausalLM, optimizer: Optimizer, groups: Groups, rewards: Tensor) -> float:
    """One step on rollouts and their rewards [prompts, samples]; returns the gradient's norm."""
    for group, advantage in zip(groups, advantages(rewards), strict=True):
        if bool((advantage != 0).any()):  # else there is nothing to learn of it
            old = torch.stack([one.logprobs for one in group])
            (loss_of(log_probs(model, group), old, advantage) / len(groups)).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(norm)


def evaluate(pipe: Pipeline, asked: list[Task]) -> list[Drawn]:
    """One image of each task with its own seed, judged. What fails to be drawn is wrong in everything."""
    requests = [ImageRequest(task.prompt, task.seed, task.reference) for task in asked]
    images = pipe.generate_each(requests, **DRAWING)
    return [
        Drawn(task, None, NOTHING, False, 0.0)
        if isinstance(image, Blip3oError)
        else judge_task(task, image, [], 0.0)
        for task, image in zip(asked, images, strict=True)
    ]


def measured(drawn: list[Drawn]) -> dict[str, Any]:
    """Mean reward and share right of captions and of edits, each [value, low, high] with its 95% interval.

    "wrong" counts the images that have each property wrong.
    """
    found: dict[str, Any] = {"wrong": Counter(name for one in drawn for name in one.wrong)}
    for category in ("two", "edit"):
        some = [one for one in drawn if one.task.category == category]
        rewards, right = torch.tensor([reward(one) for one in some]), sum(one.verdict.right for one in some)
        mean, half = float(rewards.mean()), Z_95 * float(rewards.std()) / len(some) ** 0.5
        found[f"{category}_reward"] = [mean, mean - half, mean + half]
        found[f"{category}_right"] = [right / len(some), *wilson_interval(right, len(some))]
    return found


def compare(
    pipe: Pipeline, published: PublishedRollouts, asked: list[Task], samples: int, seed: int
) -> dict[str, float]:
    """Seconds of the same tasks by the runtime and the published way, with as many steps and with 30."""
    spent: dict[str, float] = defaultdict(float)
    for turn in range(2):
        torch.manual_seed(seed + turn)
        with timed(spent, "our_tokens"):
            rollouts_of(pipe, asked, samples, seed + turn, images=False)
        with timed(spent, "our_rollouts"):
            rollouts_of(pipe, asked, samples, seed + turn)
        for task in asked:
            with timed(spent, "published_tokens"):
                _, hidden = published.tokens(task, samples)
            with timed(spent, "published_rollouts"):
                published.images(task, hidden, DRAWING["steps"])
            with timed(spent, "published_rollouts_at_30"):
                published.images(task, hidden, DEFAULT_STEPS)
    ours = {"tokens": "our_tokens", "rollouts": "our_rollouts", "rollouts_at_30": "our_rollouts"}
    for name in ("rollouts", "rollouts_at_30"):  # of which only the images are counted so far
        spent[f"published_{name}"] += spent["published_tokens"]
    return spent | {f"times_{name}": spent[f"published_{name}"] / spent[mine] for name, mine in ours.items()}


@contextmanager
def timed(spent: dict[str, float], name: str) -> Iterator[None]:
    """Count the processor's seconds of the block."""
    begin = time.process_time()  # of the one thread: what else runs on the machine does not count
    yield
    spent[name] += time.process_time() - begin


def train(arguments: argparse.Namespace) -> None:
    """Make the start, train, and write a line of numbers for every step and evaluation."""
    torch.set_num_threads(1)
    if native.cpu_module() is None:
        raise OpError("the kernels of this tree are not built: run `make build` or `pip install -e .`")
    out, began = arguments.out, time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    state = load_state(out / "state.pt")
    check_arguments(arguments, state["step"] if state else 0)
    log = (out / "log.jsonl").open("a" if state else "w")

    def write(**fields: Any) -> None:
        line = json.dumps(fields)
        print(line, file=log, flush=True)
        short = json.loads(line, parse_float=lambda digits: float(f"{float(digits):.4g}"))
        print(f"{(time.perf_counter() - began) / 60:5.1f} min ", short, flush=True)

    if not (out / "start").exists():
        make_start(arguments, write)
    import_checkpoint(out / "start", out / "run")
    reference = ReferencePipeline(out / "run")
    model = reference.model.language_model.requires_grad_()
    batch = arguments.prompts * arguments.samples
    pipe = Pipeline.load(out / "start", device="cpu", dtype="fp32", max_batch=batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, weight_decay=0.0)
    unseen = tasks(2 * arguments.evaluate, EVALUATION_SEED, held_out=True)

    def show(step: int, name: str) -> None:
        drawn = evaluate(pipe, unseen)
        write(step=step, **measured(drawn), checksum=pipe.weights_checksum())
        save_png(contact_sheet(drawn[: 2 * ON_THE_SHEET], UNSEEN).quantize(), out / f"{name}.png", {})

    if state is None:
        show(0, "before")
        write(step=0, apart=check_agreement(model, rollouts_of(pipe, tasks(4, 0), 4, 0, images=False)))
    else:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        pipe.update_weights(model.named_parameters())
    compared = {1, arguments.steps // 2, arguments.steps}
    for step in range(state["step"] + 1 if state else 1, arguments.steps + 1):
        asked, seed = tasks(arguments.prompts, arguments.seed * 10**6 + step), step * 1000
        if step in compared:
            write(step=step, **compare(pipe, PublishedRollouts(reference), asked, arguments.samples, seed))
        spent: dict[str, float] = defaultdict(float)
        with timed(spent, "rollouts"):
            groups = rollouts_of(pipe, asked, arguments.samples, seed)
        with timed(spent, "judge"):
            pairs = zip(asked, groups, strict=True)
            rewards = torch.tensor([[reward(judged(task, one)) for one in group] for task, group in pairs])
        with timed(spent, "training"):
            for _ in range(arguments.updates):
                norm = update(model, optimizer, groups, rewards)
            pipe.update_weights(model.named_parameters())
        means = {name: float(rewards[first::2].mean()) for first, name in enumerate(("two", "edit"))}
        logprob = float(torch.stack([one.logprobs for group in groups for one in group]).mean())
        write(step=step, reward=float(rewards.mean()), **means, norm=norm, logprob=logprob, **spent)
        if step % SAVE_EVERY == 0:
            kept = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            save_atomically(kept, out / "state.pt")
    write_checkpoint(model, out / "trained")
    pipe.update_weights(out / "trained")
    show(arguments.steps, "after")
    draw_curves(out / "log.jsonl", out / "curves.png")
    summary = json.dumps(summarize(out / "log.jsonl"), indent=2)
    (out / "summary.json").write_text(f"{summary}\n")
    print(summary)


def check_arguments(arguments: argparse.Namespace, done: int) -> None:
    """Write what decides the results to the folder. Raises ParameterError where it holds another run."""
    given = {name: value for name, value in vars(arguments).items() if name not in ("out", "steps")}
    path = arguments.out / "arguments.json"
    kept = json.loads(path.read_text()) if path.exists() else given
    others = [f"--{name.replace('_', '-')} {kept[name]}" for name in given if kept[name] != given[name]]
    if done > arguments.steps:
        others.append(f"--steps {done}")
    if others:
        held = f"{arguments.out} holds a run with {' '.join(others)}"
        raise ParameterError(f"{held}: repeat that, or choose another --out")
    path.write_text(json.dumps(given))


def main() -> None:
    """Parse the arguments and train. Exits with 2 and one line for what it refuses."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--prompts", type=int, default=4, help="of a step, half of them edits")
    parser.add_argument("--samples", type=int, default=8, help="of a prompt")
    parser.add_argument("--updates", type=int, default=2, help="of the weights on the rollouts of a step")
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--evaluate", type=int, default=200, help="held-out prompts, and as many edits")
    parser.add_argument("--wrong", type=float, default=0.5, help="share of the start's wrong captions")
    parser.add_argument("--start-steps", type=int, default=60)
    parser.add_argument("--start-batch", type=int, default=32)
    parser.add_argument("--start-rate", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/grpo"))
    try:
        train(parser.parse_args())
    except Blip3oError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
