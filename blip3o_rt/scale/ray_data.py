"""A batch on a Ray cluster: shards are the rows of a Ray Data set, workers with a model draw them.

The folder of the batch is one that all machines see. A shard is drawn as on one machine, so files, resuming
and bits are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blip3o_rt.errors import Blip3oError, GenerationError, first_line
from blip3o_rt.scale.cluster import connected
from blip3o_rt.scale.shards import Batch, BatchFolder


@dataclass(frozen=True)
class Workers:
    """How many processes with a model, and what of a machine each takes; `gpus` None is 1 on a GPU."""

    count: int = 1
    cpus: float = 1.0
    gpus: float | None = None


class ShardWorker:
    """Draws shards in an actor of Ray."""

    def __init__(self, folder: str, batch: Batch, model: Mapping[str, Any]) -> None:
        from blip3o_rt.pipeline import Pipeline

        self._batches = BatchFolder(Path(folder), batch)
        self._pipeline = Pipeline.load(**model)
        self._batches.check_weights(self._pipeline.weights_checksum())

    def __call__(self, shards: dict[str, Any]) -> dict[str, Any]:
        """Draw some shards; returns how many rows of each were missing."""
        from blip3o_rt.scale.batch import draw_shard

        rows = []
        for shard in shards["shard"]:
            number = int(shard)
            done: list[int] = []
            if number in self._batches.unfinished():  # else a worker that was lost had finished it
                draw_shard(self._pipeline, self._batches, number, done.append)
            rows.append(len(done))
        return {"shard": shards["shard"], "rows": rows}


def draw_on_ray(
    batches: BatchFolder,
    model: Mapping[str, Any],
    shards: list[int],
    address: str,
    workers: Workers,
    told: Callable[[int], object],
) -> None:
    """Draw shards on a cluster.

    Args:
        batches: The batch's folder.
        model: Keyword arguments of Pipeline.load.
        shards: The numbers of what is to be drawn.
        address: As ray.init takes it: "auto", "local" or "ray://host:port".
        workers: How many processes draw.
        told: Given the number of rows of every shard that is finished.

    Raises:
        GenerationError: A worker failed for good.
        ParameterError: Ray is not installed, or there is no cluster at the address.
    """
    connected(address)
    import ray.data
    import ray.exceptions

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    gpus = workers.gpus
    if gpus is None:
        gpus = 1.0 if model.get("device") != "cpu" and ray.cluster_resources().get("GPU") else 0.0
    data = ray.data.from_items([{"shard": shard} for shard in shards], override_num_blocks=len(shards))
    drawn = data.map_batches(
        ShardWorker,
        fn_constructor_args=(str(batches.folder.absolute()), batches.batch, dict(model)),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=workers.count),
        num_cpus=workers.cpus,
        num_gpus=gpus,
    )
    try:
        for row in drawn.iter_rows():
            told(int(row["rows"]))
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, Blip3oError):
            raise cause from None
        raise GenerationError(f"the batch failed on Ray: {first_line(error)}") from error
