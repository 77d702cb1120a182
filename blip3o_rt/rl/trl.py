"""Rollouts of a pipeline for trl's GRPOTrainer: `GRPOTrainer(..., rollout_func=RolloutFunc(pipe))`."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from blip3o_rt.errors import ParameterError, shown
from blip3o_rt.pipeline import Pipeline
from blip3o_rt.rl.rollout import Rollout

PROCESS_SEEDS = 2**40  # between the seeds of two processes of a trainer


class RolloutFunc:
    """Draws what the trainer asks for with the weights that it has just trained.

    The trainer's forward pass gives log-probabilities over the whole vocabulary, so those of a rollout are
    its raw ones: the trainer's temperature must be 1. Reward functions get the images as `image`, uint8
    [3, H, W], and the seeds as `seed`.

    Args:
        pipeline: Draws; its decoder has the trainer's weights from the first call on.
        seed: Of the first sample; every further one has the next.
        options: Those of Pipeline.rollout, as top_k, top_p, steps and images.
    """

    def __init__(self, pipeline: Pipeline, *, seed: int = 0, **options: Any) -> None:
        self._pipeline, self._options = pipeline, options
        self._next_seed = seed
        self._trained: int | None = None  # the trainer's step whose weights are in use

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
        """A completion for every entry of the prompts, in order.

        Equal prompts that follow each other are one group, drawn with consecutive seeds.

        Raises ParameterError for a trainer whose temperature is not 1.
        """
        if trainer.args.temperature != 1.0:
            raise ParameterError(f"the trainer's temperature is {trainer.args.temperature}: accepted is 1.0")
        if trainer.state.global_step != self._trained:
            self._pipeline.update_weights(trainer.accelerator.unwrap_model(trainer.model).named_parameters())
            self._trained = trainer.state.global_step
        first = self._next_seed + PROCESS_SEEDS * trainer.accelerator.process_index
        rollouts: list[Rollout] = []
        for size, texts in _groups([_text(prompt) for prompt in prompts]):
            rollouts += self._pipeline.rollout(texts, size, first, **self._options)
            first += size
            self._next_seed += size
        return {
            "prompt_ids": [rollout.prompt_ids.tolist() for rollout in rollouts],
            "completion_ids": [rollout.token_ids.tolist() for rollout in rollouts],
            "logprobs": [rollout.logprobs.tolist() for rollout in rollouts],
            "image": [rollout.image for rollout in rollouts],
            "seed": [rollout.seed for rollout in rollouts],
        }


def _groups(texts: list[str]) -> list[tuple[int, list[str]]]:
    """Prompts in order with how often each follows itself; neighbors of one number are one call."""
    counts = [(text, len(list(same))) for text, same in groupby(texts)]
    return [(size, [text for text, _ in some]) for size, some in groupby(counts, lambda pair: pair[1])]


def _text(prompt: Any) -> str:
    """A prompt, or what the user said last in a conversation."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[-1], dict):
        content = prompt[-1].get("content")
        if isinstance(content, list):  # typed blocks
            content = "\n".join(block["text"] for block in content if block.get("type") == "text")
        prompt = content
    if not isinstance(prompt, str):
        raise ParameterError(f"a prompt is {shown(prompt)}: accepted is text, or messages that end with it")
    return prompt
