"""What a load on a server comes to: percentiles, images a second, the share in time; JSON, CSV, text."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from blip3o_rt import __version__
from blip3o_rt.files import replacing
from blip3o_rt.measure.provenance import commit, machine
from blip3o_rt.measure.serve.load import Load, Sample

LOAD = ("url", "loop", "requests", "concurrency", "body", "previews")
PERCENTILES = (50, 90, 95, 99)
COMPARED = ("images_per_second", "first_image")  # between a load and one call, by medians over the rounds


def summary(
    load: Load, samples: Sequence[Sample], deadline: float | None, calls: Sequence[dict[str, float]] = ()
) -> dict[str, Any]:
    """The record of a load, ready for JSON; times are seconds.

    Images a second and the first image's time are medians over the rounds, each of which is kept. `calls`: of
    `generate`, one a round.
    """
    done = [sample for sample in samples if not sample.error]
    rounds = [
        _round([sample for sample in samples if sample.round == number])
        for number in sorted({sample.round for sample in samples})
    ]
    previews = [sample.preview - sample.sent for sample in done if sample.preview is not None]
    found = {
        "kind": "serve",
        "version": __version__,
        "machine": machine(),
        "commit": commit(),
        "load": {name: getattr(load, name) for name in LOAD + (() if load.concurrency else ("rate",))},
        "seconds": sum(found["seconds"] for found in rounds),
        "images": sum(found["images"] for found in rounds),
        **_medians(rounds),
        "rounds": rounds,
        "completed": len(done),
        "failed": dict(Counter(sample.error for sample in samples if sample.error)),
        "latency": percentiles([sample.latency for sample in done]),
        "queue": percentiles([sample.queue for sample in done if sample.queue is not None]),
        "time_to_first_preview": percentiles(previews),
    }
    if deadline is not None:
        in_time = sum(sample.latency <= deadline for sample in done)
        found |= {"deadline": deadline, "share_within_deadline": in_time / len(samples) if samples else 0.0}
    if calls:
        found["one_call"] = {**_medians(calls), "rounds": list(calls)}
    return found


def _round(samples: Sequence[Sample]) -> dict[str, Any]:
    """What one round of the load came to."""
    done = [sample for sample in samples if not sample.error]
    seconds, images = max(sample.ended for sample in samples), sum(sample.images for sample in done)
    first = min((sample.ended for sample in done), default=None)
    return {"seconds": seconds, "images": images, "images_per_second": images / seconds, "first_image": first}


def _medians(rounds: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """The medians over rounds of what is compared; None of what no round has."""
    values = {name: [one[name] for one in rounds if one[name] is not None] for name in COMPARED}
    return {name: float(np.median(found)) if found else None for name, found in values.items()}


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Mean and PERCENTILES of values; empty where there are none."""
    if not values:
        return {}
    return {"mean": float(np.mean(values)), **{f"p{p}": float(np.percentile(values, p)) for p in PERCENTILES}}


def table(record: dict[str, Any]) -> str:
    """The record for people."""
    names = {"latency": "latency", "queue": "in the queue", "time_to_first_preview": "to the first preview"}
    rows = [
        [text, *[f"{record[name][column]:.3f}" for column in record[name]]]
        for name, text in names.items()
        if record[name]
    ]
    lines = [
        tabulate(rows, ["seconds", "mean", *[f"p{p}" for p in PERCENTILES]], disable_numparse=True),
        f"{record['images']} images in {record['seconds']:.2f} s",
        "",
        _compared(record),
    ]
    if record["failed"]:
        lines.append("failed: " + ", ".join(f"{count} {error}" for error, count in record["failed"].items()))
    if "deadline" in record:
        lines.append(f"within {record['deadline']:g} s: {record['share_within_deadline']:.1%}")
    return "\n".join(lines)


def _compared(record: dict[str, Any]) -> str:
    """Images a second and the first image of every round, of the load and of one call beside it."""
    sides = {"served": record} | ({"one call": record["one_call"]} if "one_call" in record else {})
    rounds = zip(*(side["rounds"] for side in sides.values()), strict=True)
    rows = [
        [name, *(side[value] for side in found for value in COMPARED)]
        for name, found in [*enumerate(rounds, 1), ("median", sides.values())]
    ]
    heads = [f"{side}: {what}" for side in sides for what in ("images/s", "first image, s")]
    return tabulate(rows, ["round", *heads], floatfmt=".3f")


def write(folder: Path, record: dict[str, Any], samples: Sequence[Sample]) -> list[Path]:
    """Write serve.json, serve.csv and, where matplotlib is there, serve.html; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    rows = [sample.row() for sample in sorted(samples, key=lambda sample: (sample.round, sample.number))]
    writer = csv.DictWriter(text, list(rows[0]) if rows else ["number"])
    writer.writeheader()
    writer.writerows(rows)
    files = {"serve.json": json.dumps(record, indent=2) + "\n", "serve.csv": text.getvalue()}
    try:
        from blip3o_rt.measure.serve.page import page

        files["serve.html"] = page(record, samples, table(record))
    except ModuleNotFoundError:
        pass  # pages are of the extra `bench`
    for name, content in files.items():
        with replacing(folder / name) as temporary:
            temporary.write_text(content, encoding="utf-8")
    return [folder / name for name in files]
