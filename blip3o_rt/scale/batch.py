"""A batch on one machine: its shards one after the other, every row's image kept as soon as it is drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from blip3o_rt.errors import Blip3oError
from blip3o_rt.pipeline import ImageRequest, Pipeline
from blip3o_rt.scale.rows import Row
from blip3o_rt.scale.shards import BatchFolder


def draw_here(
    batches: BatchFolder, model: Mapping[str, Any], shards: list[int], told: Callable[[int], object]
) -> None:
    """Draw shards in this process, with the model that keyword arguments of Pipeline.load name."""
    pipeline = Pipeline.load(**model)
    batches.check_weights(pipeline.weights_checksum())
    for shard in shards:
        draw_shard(pipeline, batches, shard, told)


def draw_shard(
    pipeline: Pipeline, batches: BatchFolder, shard: int, told: Callable[[int], object] = lambda rows: None
) -> None:
    """Draw what is missing of a shard and finish it.

    Args:
        pipeline: The model.
        batches: The batch's folder.
        shard: The shard's number.
        told: Given the number of rows that are done since the last call.
    """
    rows = batches.missing(shard)
    for first in range(0, len(rows), pipeline.max_batch):
        _draw(pipeline, batches, rows[first : first + pipeline.max_batch], told)
    batches.finish(shard)


def _draw(pipeline: Pipeline, batches: BatchFolder, rows: list[Row], told: Callable[[int], object]) -> None:
    """Draw some rows, whose tokens are drawn together."""
    batch = batches.batch
    taken: list[Row] = []
    requests: list[ImageRequest] = []

    def done(row: Row, found: Image.Image | Blip3oError) -> None:
        batches.done(row, found)
        told(1)

    def keep(index: int, found: Image.Image | Blip3oError) -> None:
        done(taken[index], found)

    for row in rows:
        try:
            references = row.references(Path(batch.prompts).parent)
        except Blip3oError as error:
            done(row, error)
        else:
            requests.append(ImageRequest(row.prompt, batch.seed + row.index, references or None))
            taken.append(row)
    pipeline.generate_each(requests, on_result=keep, **batch.sampling, **batch.diffusion)
