"""The time of a whole image from the times of its stages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from blip3o_rt.measure.records import COMPOSED, OURS, Line, Record, number


@dataclass(frozen=True)
class Part:
    """So many calls of a stage line of one candidate."""

    line: str
    who: str
    count: int
    batch: int = 1


def recipes(tokens: int, steps: int, batch: int, baselines: Iterable[str]) -> dict[str, list[Part]]:
    """Who -> the stages that `batch` images of one prompt consist of.

    The published code draws over the whole vocabulary, makes a second pass, and runs the connector at every
    step. Its compiled forms compile tokens, steps and decoder.

    Args:
        baselines: of "published", "published-compiled" and "published-graphed" those that are wanted.
    """
    once = [Part("ar.prefill", OURS, 1), Part("ar.token", OURS, tokens, batch), Part("dit.tables", OURS, 1)]
    each = [("connector", 1), ("dit.condition", 1), ("dit.step", steps), ("vae.decode", 1)]
    found = {OURS: once + [Part(line, OURS, count * batch) for line, count in each]}
    for who in baselines:
        stage = "diffusers" if who == "published" else who
        found[who] = [
            Part("ar.prefill", "transformers", 1),
            Part("ar.token", who, tokens, batch),
            Part("ar.second_pass", "published", batch),
            Part("connector", "published", steps * batch),
            Part("dit.step", stage, steps * batch),
            Part("vae.decode", stage, batch),
        ]
    return found


def composed(parts: Sequence[Part], lines: Iterable[Line]) -> float | None:
    """Seconds of all parts by the lines' medians; None where one was not measured."""
    medians = {(line.name, line.who, line.batch): line.median for line in lines}
    found = [medians.get((part.line, part.who, part.batch)) for part in parts]
    if any(median is None for median in found):
        return None
    return sum(part.count * median for part, median in zip(parts, found, strict=True) if median is not None)


def note(parts: Sequence[Part]) -> str:
    """ "composed: 729 x ar.token (ours) + 30 x dit.step (ours) + ..." """
    return COMPOSED + " + ".join(f"{part.count} x {part.line} ({part.who})" for part in parts)


def breakdown(record: Record, lines: Sequence[Line], baselines: Iterable[str]) -> dict[str, dict[str, float]]:
    """Who -> stage -> seconds of one image; only those whose stages were all timed.

    Empty where the record does not say how many tokens and steps an image takes.
    """
    tokens, steps = number(record.model.get("tokens_per_image")), number(record.model.get("steps"))
    if tokens is None or steps is None:
        return {}
    medians: Mapping[tuple[str, str], float] = {
        (line.name, line.who): line.median for line in lines if line.batch == 1 and line.median is not None
    }
    return {
        who: {part.line: part.count * medians[part.line, part.who] for part in parts}
        for who, parts in recipes(int(tokens), int(steps), 1, baselines).items()
        if all((part.line, part.who) in medians for part in parts)
    }
