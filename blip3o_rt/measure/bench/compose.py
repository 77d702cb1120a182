"""The time of a whole picture from the times of its stages, where drawing one would take too long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

OURS = "ours"
COMPOSED = "composed: "  # how the note of a picture begins that was not drawn
Lines = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Part:
    """So many calls of a stage line of somebody's."""

    line: str
    who: str
    count: int
    batch: int = 1


def parts_of_ours(tokens: int, steps: int, batch: int) -> list[Part]:
    """What the runtime does for `batch` pictures of one prompt."""
    once = [
        Part("ar.prefill", OURS, 1),
        Part("ar.token", OURS, tokens, batch),
        Part("dit.tables", OURS, 1),
    ]
    each = [("connector", 1), ("dit.condition", 1), ("dit.step", steps), ("vae.decode", 1)]
    return once + [Part(line, OURS, count * batch) for line, count in each]


def parts_of_published(tokens: int, steps: int, batch: int, who: str = "published") -> list[Part]:
    """What the published way does: draws over the whole vocabulary, a second pass, the connector every step.

    who: "published", or one of its compiled forms, whose tokens, steps and decoder are compiled.
    """
    stage = "diffusers" if who == "published" else who
    return [
        Part("ar.prefill", "transformers", 1),
        Part("ar.token", who, tokens, batch),
        Part("ar.second_pass", "published", batch),
        Part("connector", "published", steps * batch),
        Part("dit.step", stage, steps * batch),
        Part("vae.decode", stage, batch),
    ]


def composed(parts: Sequence[Part], lines: Lines) -> float | None:
    """Seconds of all parts by the lines' medians; None where one was not measured."""
    medians = {(line["name"], line["who"], line["batch"]): line["median"] for line in lines}
    found = [medians.get((part.line, part.who, part.batch)) for part in parts]
    if any(median is None for median in found):
        return None
    return sum(part.count * median for part, median in zip(parts, found, strict=True) if median is not None)


def in_words(parts: Sequence[Part]) -> str:
    """ "composed: 729 x ar.token + 30 x dit.step + ..." """
    return COMPOSED + " + ".join(f"{part.count} x {part.line} ({part.who})" for part in parts)
