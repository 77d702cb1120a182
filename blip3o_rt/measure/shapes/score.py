"""Scores a model of the shapes: draws tasks, judges the pixels, and counts with confidence intervals."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image
from tabulate import tabulate

from blip3o_rt.errors import GenerationError, ParameterError
from blip3o_rt.measure.shapes.codes import TOKENS_PER_IMAGE, USED_CODES, describe_codes
from blip3o_rt.measure.shapes.edits import EDIT_KINDS
from blip3o_rt.measure.shapes.foreign_judge import judge_foreign_edit
from blip3o_rt.measure.shapes.judge import Verdict, judge, judge_edit, read_image
from blip3o_rt.measure.shapes.render import render
from blip3o_rt.measure.shapes.scene import IMAGE_SIZE
from blip3o_rt.measure.shapes.tasks import CATEGORIES, FOREIGN, FOREIGN_EDIT, Task

if TYPE_CHECKING:
    from blip3o_rt.pipeline import Pipeline
    from blip3o_rt.result import Report, Result

Z_95 = 1.959964  # standard normal quantile of 97.5%
PROPERTIES = ("background", "count", "colour", "kind", "size", "place", "unchanged", "plan")
NOTHING = Verdict(*[False] * len(dataclasses.fields(Verdict)))


@dataclass(frozen=True)
class Drawn:
    """A task, the image that came of it (None: drawing failed) and what is right about it.

    plan_right: whether the image tokens, read as codes, describe the scene, whatever the image shows.
    report: what drawing it took; None where it failed or was not drawn here.
    """

    task: Task
    image: Image.Image | None
    verdict: Verdict
    plan_right: bool
    seconds: float
    report: Report | None = None

    @property
    def properties(self) -> dict[str, bool]:
        """Every property of PROPERTIES that applies, and "right": all that the pixels show."""
        found = dataclasses.asdict(self.verdict) | {"plan": self.plan_right, "right": self.verdict.right}
        if self.task.edit is None or self.task.foreign is not None:
            del found["unchanged"]
        return found

    @property
    def wrong(self) -> list[str]:
        """The properties of the image that are wrong."""
        return [name for name, right in dataclasses.asdict(self.verdict).items() if not right]


@dataclass(frozen=True)
class Score:
    """How many of n images of a category have a property right; "right" is all properties together."""

    category: str
    name: str
    right: int
    n: int

    @property
    def share(self) -> float:
        return self.right / self.n

    @property
    def interval(self) -> tuple[float, float]:
        return wilson_interval(self.right, self.n)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary."""
        low, high = self.interval
        counts = {"category": self.category, "property": self.name, "right": self.right, "n": self.n}
        return {**counts, "share": self.share, "low": low, "high": high}


def wilson_interval(right: int, n: int, z: float = Z_95) -> tuple[float, float]:
    """The interval of Wilson (1927) for a share of which `right` of `n` were seen; 95% at the default z."""
    if n == 0:
        return 0.0, 1.0
    share, denominator = right / n, 1 + z * z / n
    middle = (share + z * z / (2 * n)) / denominator
    reach = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / denominator
    return max(0.0, middle - reach), min(1.0, middle + reach)


def check_model(pipeline: Pipeline) -> None:
    """Raise ParameterError for a model that cannot know the shapes: of another image size or token grid."""
    size, tokens = pipeline.config.image_size, pipeline.config.image_tokens
    if size != IMAGE_SIZE or tokens.tokens_per_image != TOKENS_PER_IMAGE:
        raise ParameterError(
            f"the model draws {size} px images of {tokens.tokens_per_image} tokens: accepted is a model of "
            f"the shapes, {IMAGE_SIZE} px and {TOKENS_PER_IMAGE} tokens"
        )
    if tokens.num_image_tokens < USED_CODES:
        raise ParameterError(
            f"the model has {tokens.num_image_tokens} image tokens: accepted is a model of the shapes, with "
            f"at least {USED_CODES}"
        )


def draw_and_judge(pipeline: Pipeline, tasks: Sequence[Task], **options: Any) -> Iterator[Drawn]:
    """Draws every task by itself, with its own seed; options are those of Pipeline.generate.

    An image whose drawing fails (GenerationError) is wrong in everything.
    """
    for task in tasks:
        begin = time.perf_counter()
        try:
            result = _draw(pipeline, task, options)
        except GenerationError:
            yield Drawn(task, None, NOTHING, False, time.perf_counter() - begin)
            continue
        seconds = time.perf_counter() - begin
        first = pipeline.config.image_tokens.image_token_range.start
        codes = [token - first for token in result.plans[0].token_ids.flatten().tolist()]
        yield dataclasses.replace(judge_task(task, result[0], codes, seconds), report=result.report)


def _draw(pipeline: Pipeline, task: Task, options: dict[str, Any]) -> Result:
    reference = task.reference
    if reference is None:
        return pipeline.generate(task.prompt, seed=task.seed, **options)
    return pipeline.edit(task.prompt, reference, seed=task.seed, **options)


def judge_task(task: Task, image: Image.Image, codes: Sequence[int], seconds: float) -> Drawn:
    """What is right about a task's image, and about its plan [tokens] of codes."""
    if task.foreign is not None:
        verdict = judge_foreign_edit(image, task.foreign)
    elif task.edit is not None:
        verdict = judge_edit(image, render(task.edit.before), task.edit)
    else:
        verdict = judge(read_image(image), task.scene)
    return Drawn(task, image, verdict, describe_codes(codes).shows_the_same(task.scene), seconds)


def scores(drawn: Sequence[Drawn]) -> list[Score]:
    """Every property by category, by kind of edit and over all of the own world.

    Categories without images are left out.
    """
    right: Counter[tuple[str, str]] = Counter()
    seen: Counter[tuple[str, str]] = Counter()
    for one in drawn:
        names = [one.task.category]
        if one.task.foreign is None:
            names.append("all")
        if one.task.edit is not None:
            names.append(edit_category(one.task.edit.kind, one.task.category))
        for name in names:
            for key, good in one.properties.items():
                seen[name, key] += 1
                right[name, key] += good
    foreign = [edit_category(kind, FOREIGN_EDIT) for kind in EDIT_KINDS]
    categories = [*CATEGORIES, *map(edit_category, EDIT_KINDS), "all", *foreign, *FOREIGN]
    return [
        Score(category, key, right[category, key], seen[category, key])
        for category in categories
        for key in ("right", *PROPERTIES)
        if seen[category, key]
    ]


def edit_category(kind: str, category: str = "edit") -> str:
    """The category of one kind of edit."""
    return f"{category}: {kind}"


def share_right(drawn: Sequence[Drawn]) -> float:
    """The share of all images that are right in everything; 0 where there are none."""
    return sum(one.verdict.right for one in drawn) / len(drawn) if drawn else 0.0


def table(drawn: Sequence[Drawn]) -> str:
    """What a person reads: images right by category, then each world's by property."""
    found = scores(drawn)
    blocks = {
        "category": [_row(score.category, score) for score in found if score.name == "right"],
        "property": [_row(s.name, s) for s in found if s.category == "all" and s.name != "right"],
        f"property, {FOREIGN_EDIT}": [
            _row(s.name, s) for s in found if s.category == FOREIGN_EDIT and s.name != "right"
        ],
    }
    return "\n\n".join(
        tabulate(rows, [name, "images", "right", "95% interval"], disable_numparse=True, colalign=ALIGN)
        for name, rows in blocks.items()
        if rows
    )


ALIGN = ("left", "right", "right", "right")


def _row(name: str, score: Score) -> list[str]:
    low, high = score.interval
    return [name, str(score.n), f"{100 * score.share:.1f}%", f"{100 * low:.1f} to {100 * high:.1f}%"]


def record(drawn: Sequence[Drawn]) -> dict[str, Any]:
    """The scores and every image's verdict, JSON-ready."""
    return {
        "scores": [score.to_dict() for score in scores(drawn)],
        "pictures": [
            {
                "category": one.task.category,
                "edit": None if one.task.edit is None else one.task.edit.kind,
                "prompt": one.task.prompt,
                "seed": one.task.seed,
                "failed": one.image is None,
                "seconds": round(one.seconds, 4),
                **one.properties,
            }
            for one in drawn
        ],
    }
