"""Words for scenes: noun phrases, places and the several wordings of a caption."""

from __future__ import annotations

import random

from blip3o_rt.measure.shapes.scene import Scene, Shape

SIZE_WORDS = {"small": ("small", "small", "little", "tiny"), "large": ("large", "large", "big")}
COLOUR_WORDS = {"gray": ("gray", "grey")}
PLACE_WORDS = {
    "left": ("on the left", "at the left", "on the left side"),
    "right": ("on the right", "at the right", "on the right side"),
    "top": ("at the top", "on the top"),
    "bottom": ("at the bottom", "on the bottom"),
    "centre": ("in the centre", "in the center", "in the middle"),
}
CORNER_WORDS = ("in the {}", "in the {} corner", "at the {}")
OMIT_SIZE_SHARE = 0.1
OMIT_PLACE_SHARE = 0.1
OMIT_BACKGROUND_SHARE = 0.03


def colour_word(colour: str, rng: random.Random) -> str:
    """A word for a palette colour."""
    return rng.choice(COLOUR_WORDS.get(colour, (colour,)))


def place_words(place: str, rng: random.Random) -> str:
    """A phrase for one of the nine places, such as "in the top left corner"."""
    if place in PLACE_WORDS:
        return rng.choice(PLACE_WORDS[place])
    return rng.choice(CORNER_WORDS).format(place)


def noun_phrase(shape: Shape, rng: random.Random, size: bool = True) -> str:
    """A noun phrase without its article, such as "large red circle"."""
    words = [rng.choice(SIZE_WORDS[shape.size])] if size else []
    return " ".join([*words, colour_word(shape.colour, rng), shape.kind])


def with_article(phrase: str) -> str:
    """The phrase after "a" or "an"."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def caption(scene: Scene, rng: random.Random, complete: bool = False) -> str:
    """A caption of the scene; unless complete, it now and then omits a size, a place or the background."""

    def omits(share: float) -> bool:
        return not complete and rng.random() < share

    background = None if omits(OMIT_BACKGROUND_SHARE) else colour_word(scene.background, rng)
    if not scene.shapes:
        colour = background or colour_word(scene.background, rng)
        return rng.choice(
            ("an empty {} background", "a plain {} background", "nothing on a {} background")
        ).format(colour)
    parts = []
    for shape in rng.sample(scene.shapes, len(scene.shapes)):
        phrase = with_article(noun_phrase(shape, rng, size=not omits(OMIT_SIZE_SHARE)))
        parts.append((phrase, None if omits(OMIT_PLACE_SHARE) else place_words(shape.place, rng)))
    return _sentence(parts, background, rng)


def _sentence(parts: list[tuple[str, str | None]], background: str | None, rng: random.Random) -> str:
    """One of several wordings of the shapes (phrase, place) over a background."""
    if rng.random() < 0.12 and all(place for _, place in parts):
        shapes = " and ".join(f"{place} {phrase}" for phrase, place in parts)
    else:
        shapes = rng.choice((" and ", " and ", ", ")).join(
            f"{phrase} {place}" if place else phrase for phrase, place in parts
        )
    if background is None:
        return shapes
    behind = with_article(f"{background} background")
    wordings = (
        f"{shapes} on {behind}",
        f"{shapes} on {behind}",
        f"{shapes}, {background} background",
        f"{behind} with {shapes}",
        f"draw {shapes} on {behind}",
    )
    return rng.choice(wordings)
