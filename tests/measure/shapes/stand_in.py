"""A stand-in for the model: draws whatever a test wants for each task of a score, without any weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from PIL import Image

from blip3o_rt.measure.shapes.codes import scene_codes
from blip3o_rt.measure.shapes.render import render
from blip3o_rt.measure.shapes.scene import Scene
from blip3o_rt.measure.shapes.tasks import Task

FIRST_IMAGE_TOKEN = 500


class StandIn:
    """Answers every task by the scene `answer` gives for it; a task is known by its seed."""

    dtype, precision = torch.float32, "fp32"
    tier, device = "exact", torch.device("cpu")
    switches: ClassVar[dict[str, str]] = {}

    def __init__(self, tasks: Sequence[Task], answer: Callable[[Task], Scene]) -> None:
        self.tasks = {task.seed: task for task in tasks}
        self.answer = answer
        self.calls: list[dict[str, Any]] = []
        self.config = SimpleNamespace(
            image_size=64,
            image_tokens=SimpleNamespace(
                tokens_per_image=64,
                num_image_tokens=128,
                image_token_range=range(FIRST_IMAGE_TOKEN, FIRST_IMAGE_TOKEN + 128),
            ),
        )

    def generate(self, prompt: str, *, seed: int, **options: Any) -> list[Image.Image]:
        assert self.tasks[seed].edit is None
        return self._draw(prompt, seed, options)

    def edit(self, prompt: str, reference: Image.Image, *, seed: int, **options: Any) -> list[Image.Image]:
        expected = self.tasks[seed].reference
        assert expected is not None
        assert reference.tobytes() == expected.tobytes()
        return self._draw(prompt, seed, options)

    def _draw(self, prompt: str, seed: int, options: dict[str, Any]) -> list[Image.Image]:
        task = self.tasks[seed]
        assert prompt == task.prompt
        self.calls.append(options)
        scene = self.answer(task)
        ids = torch.tensor([scene_codes(scene)]) + FIRST_IMAGE_TOKEN
        return Result([render(scene)], [SimpleNamespace(token_ids=ids)])


class Result(list[Image.Image]):
    """Images with their plans, as the pipeline returns them."""

    report = None

    def __init__(self, images: list[Image.Image], plans: list[SimpleNamespace]) -> None:
        super().__init__(images)
        self.plans = plans


def what_is_asked(task: Task) -> Scene:
    """The right answer."""
    return task.scene


def something_else(task: Task) -> Scene:
    """A scene without any shape, or with a background that was not asked for: always wrong."""
    if task.scene.shapes:
        return Scene(task.scene.background)
    return Scene("red" if task.scene.background != "red" else "blue")
