"""What a score asks for: captions and edits drawn from a seed, each with the scene that it should give."""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image

from blip3o_rt.measure.shapes.captions import caption
from blip3o_rt.measure.shapes.edits import EDIT_KINDS, Edit, random_edit
from blip3o_rt.measure.shapes.foreign import ForeignEdit, foreign_edit
from blip3o_rt.measure.shapes.render import render
from blip3o_rt.measure.shapes.scene import Scene, held_out_scene, random_scene, training_scene

CATEGORIES = {
    "held out": "one shape in a combination of colour, shape and background that was never trained",
    "single": "one shape in a trained combination",
    "two": "two shapes, any combinations",
    "edit": "an exact image and a change of it, every kind of change as often, any combinations",
}
FOREIGN_EDIT = "foreign edit"
FOREIGN = {FOREIGN_EDIT: "an image that somebody else drew and a change of it, judged by hue and outline"}


@dataclass(frozen=True)
class Task:
    """One image to draw: what is asked for, the seed to draw it with, and the scene it should show.

    An edit also has the scene before; one of somebody else's image has that image.
    """

    category: str
    prompt: str
    seed: int
    scene: Scene
    edit: Edit | None = None
    foreign: ForeignEdit | None = None

    @property
    def reference(self) -> Image.Image | None:
        """The image to edit; None where there is none."""
        if self.foreign is not None:
            return self.foreign.before.draw()
        return None if self.edit is None else render(self.edit.before)


def draw_tasks(count: int, seed: int) -> list[Task]:
    """`count` tasks of every category, one of each in turn; fewer are the beginning of more."""
    streams = {category: random.Random(f"{category} {seed}") for category in CATEGORIES}
    return [
        _draw_task(category, index, seed + index * len(CATEGORIES) + number, streams[category])
        for index in range(count)
        for number, category in enumerate(CATEGORIES)
    ]


def draw_foreign_tasks(count: int, seed: int) -> list[Task]:
    """`count` edits of images that somebody else drew; fewer are the beginning of more."""
    rng, kinds, tasks = random.Random(f"{FOREIGN_EDIT} {seed}"), list(EDIT_KINDS), []
    for index in range(count):
        edit = random_edit(rng, kinds[index % len(kinds)], held_out=True)
        foreign, own_seed = foreign_edit(edit, rng), rng.getrandbits(31)
        tasks.append(Task(FOREIGN_EDIT, edit.instruction, own_seed, edit.after, edit, foreign))
    return tasks


def _draw_task(category: str, index: int, seed: int, rng: random.Random) -> Task:
    if category == "edit":
        kinds = list(EDIT_KINDS)
        edit = random_edit(rng, kinds[index % len(kinds)], held_out=True)
        return Task(category, edit.instruction, seed, edit.after, edit)
    if category == "held out":
        scene = held_out_scene(rng)
    else:
        scene = training_scene(rng, 1) if category == "single" else random_scene(rng, 2)
    return Task(category, caption(scene, rng, complete=True), seed, scene)
