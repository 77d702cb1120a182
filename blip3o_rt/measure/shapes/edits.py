"""Edits of scenes: an instruction in words, the scene before and the scene after."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from blip3o_rt.measure.shapes.captions import colour_word, noun_phrase, place_words, with_article
from blip3o_rt.measure.shapes.scene import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    Scene,
    Shape,
    is_drawable,
    is_held_out,
    random_scene,
    random_shape,
)


@dataclass(frozen=True)
class Edit:
    """What to do, in words, and the scenes before and after; kind is one of EDIT_KINDS."""

    kind: str
    instruction: str
    before: Scene
    after: Scene


def naming(shape: Shape, scene: Scene, rng: random.Random) -> str:
    """An unambiguous "the ..." for one of the scene's shapes."""
    others = [other for other in scene.shapes if other is not shape]
    names = [f"the {noun_phrase(shape, rng)} {place_words(shape.place, rng)}"]
    if all((other.colour, other.kind) != (shape.colour, shape.kind) for other in others):
        names += [f"the {colour_word(shape.colour, rng)} {shape.kind}"] * 2
    if all(other.kind != shape.kind for other in others):
        names += [f"the {shape.kind}"] * 2
    if not others:
        names.append("the shape")
    return rng.choice(names)


def _recolour(scene: Scene, rng: random.Random) -> tuple[str, Scene]:
    index = rng.randrange(len(scene.shapes))
    shape = scene.shapes[index]
    colour = rng.choice([c for c in COLOURS if c != shape.colour])
    name, word = naming(shape, scene, rng), colour_word(colour, rng)
    wordings = (
        f"make {name} {word}",
        f"change {name} to {word}",
        f"turn {name} {word}",
        f"recolour {name} to {word}",
    )
    return rng.choice(wordings), scene.with_shape(index, replace(shape, colour=colour))


def _background(scene: Scene, rng: random.Random) -> tuple[str, Scene]:
    colour = rng.choice([c for c in BACKGROUNDS if c != scene.background])
    word = colour_word(colour, rng)
    wordings = (
        f"change the background to {word}",
        f"make the background {word}",
        f"turn the background {word}",
        f"use {with_article(word)} background",
    )
    return rng.choice(wordings), replace(scene, background=colour)


def _remove(scene: Scene, rng: random.Random) -> tuple[str, Scene]:
    index = rng.randrange(len(scene.shapes))
    name = naming(scene.shapes[index], scene, rng)
    rest = scene.shapes[:index] + scene.shapes[index + 1 :]
    return rng.choice((f"remove {name}", f"delete {name}", f"take away {name}")), replace(scene, shapes=rest)


def _add(scene: Scene, rng: random.Random) -> tuple[str, Scene]:
    shape = random_shape(rng)
    words = f"{with_article(noun_phrase(shape, rng))} {place_words(shape.place, rng)}"
    return rng.choice((f"add {words}", f"draw {words}", f"put {words}")), replace(
        scene, shapes=(*scene.shapes, shape)
    )


def _move(scene: Scene, rng: random.Random) -> tuple[str, Scene]:
    index = rng.randrange(len(scene.shapes))
    shape = scene.shapes[index]
    place = rng.choice([p for p in PLACES if p != shape.place])
    name = naming(shape, scene, rng)
    words = f"{rng.choice(('move', 'shift'))} {name} to the {place}"
    if " " in place and rng.random() < 0.3:
        words += " corner"
    return words, scene.with_shape(index, replace(shape, place=place))


def _keep(scene: Scene, rng: random.Random) -> tuple[str, Scene]:
    return rng.choice(("keep the image unchanged", "keep the image unchanged", "change nothing")), scene


EDIT_KINDS: dict[str, Callable[[Scene, random.Random], tuple[str, Scene]]] = {
    "recolour": _recolour,
    "background": _background,
    "remove": _remove,
    "add": _add,
    "move": _move,
    "keep": _keep,
}


def random_edit(rng: random.Random, kind: str | None = None, held_out: bool = False) -> Edit:
    """A drawable edit of a kind (default: any); unless held_out, without held-out combinations."""
    while True:
        chosen = kind or rng.choice(list(EDIT_KINDS))
        before = random_scene(rng, rng.choice((0, 1, 1)) if chosen == "add" else rng.choice((1, 2)))
        instruction, after = EDIT_KINDS[chosen](before, rng)
        if is_drawable(after) and (held_out or not (is_held_out(before) or is_held_out(after))):
            return Edit(chosen, instruction, before, after)
