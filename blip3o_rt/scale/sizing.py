"""How many replicas a service on Ray needs, from stage times measured on this machine.

    python -m blip3o_rt.scale.sizing --max-batch 16

A planner draws the tokens of a batch together; a renderer denoises and decodes one image at a time.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from blip3o_rt.cli.options import MODEL, add_options, count, model_arguments
from blip3o_rt.cli.serve import DEFAULT_MAX_BATCH
from blip3o_rt.errors import Blip3oError
from blip3o_rt.pipeline import Pipeline

PROMPT = "a red circle on a blue background"
PLANNING, RENDERING = ("reference", "tokens"), ("denoise", "decode")


@dataclass(frozen=True)
class Sizing:
    """What replicas of each kind do where a planner's batches have a size.

    Attributes:
        batch: Images whose tokens are drawn together.
        planning: Seconds of a planner for the batch.
        rendering: Seconds of a renderer for one image.
    """

    batch: int
    planning: float
    rendering: float

    @property
    def planner_rate(self) -> float:
        """Images a second of a planner."""
        return self.batch / self.planning

    @property
    def renderer_rate(self) -> float:
        """Images a second of a renderer."""
        return 1.0 / self.rendering

    @property
    def renderers(self) -> float:
        """Renderers that one planner keeps busy."""
        return self.planner_rate / self.renderer_rate


def measure(pipeline: Pipeline, runs: int = 3, steps: int | None = None) -> list[Sizing]:
    """The sizing for batches of 1, 2, 4, ... up to the pipeline's own.

    Args:
        pipeline: The model, as a replica loads it.
        runs: Of each batch; the median counts.
        steps: Denoising steps; None is the model's own number.
    """
    options: dict[str, Any] = {} if steps is None else {"steps": steps}
    pipeline.generate(PROMPT, **options)  # what is made on first use is not measured
    found = []
    for batch in batches(pipeline.max_batch):
        planning, rendering = [], []
        for _ in range(runs):
            stages = pipeline.generate(PROMPT, n=batch, **options).report.stages
            planning.append(sum(stage.seconds for stage in stages if stage.name in PLANNING))
            rendering.append(sum(stage.seconds for stage in stages if stage.name in RENDERING) / batch)
        found.append(Sizing(batch, statistics.median(planning), statistics.median(rendering)))
    return found


def batches(most: int) -> list[int]:
    """The powers of two below a number, and the number."""
    return [*(2**power for power in range(most.bit_length()) if 2**power < most), most]


def table(sizings: Iterable[Sizing]) -> str:
    """A line for every batch, in Markdown."""
    lines = [
        (
            one.batch,
            f"{one.planning:.3g}",
            f"{one.rendering:.3g}",
            f"{one.planner_rate:.3g}",
            f"{one.renderer_rate:.3g}",
            f"{one.renderers:.2g}",
        )
        for one in sizings
    ]
    headers = (
        "batch of a planner",
        "planning, s a batch",
        "rendering, s an image",
        "images/s of a planner",
        "images/s of a renderer",
        "renderers for a planner",
    )
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True, colalign=("right",) * 6)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m blip3o_rt.scale.sizing",
        description="Measure the stages here, and print how many renderers a planner keeps busy.",
    )
    add_options(parser.add_argument_group("model"), *MODEL)
    parser.add_argument("--max-batch", type=int, default=DEFAULT_MAX_BATCH, metavar="N", help="(%(default)s)")
    parser.add_argument("--steps", type=int, metavar="N", help="denoising steps (the model's)")
    add_options(parser, count("--runs", "N", "of each batch", 3))
    parser.set_defaults(max_prompt_tokens=None)
    try:
        arguments = parser.parse_args(argv)
        pipeline = Pipeline.load(**model_arguments(arguments))
        print(table(measure(pipeline, arguments.runs, arguments.steps)))
    except Blip3oError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
