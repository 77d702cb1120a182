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

PERCENTILES = (50, 90, 95, 99)


def summary(load: Load, samples: Sequence[Sample], deadline: float | None) -> dict[str, Any]:
    """The record of a load, ready for JSON; times are seconds."""
    done = [sample for sample in samples if not sample.error]
    seconds = max((sample.ended for sample in samples), default=0.0)
    images = sum(sample.images for sample in done)
    previews = [sample.preview - sample.sent for sample in done if sample.preview is not None]
    found = {
        "kind": "serve",
        "version": __version__,
        "machine": machine(),
        "commit": commit(),
        "load": {
            "url": load.url,
            "loop": load.loop,
            "requests": load.requests,
            "concurrency": load.concurrency,
            "rate": load.rate if load.concurrency is None else None,
            "body": load.body,
            "previews": load.previews,
        },
        "seconds": seconds,
        "images": images,
        "images_per_second": images / seconds if seconds else 0.0,
        "first_image": min((sample.ended for sample in done), default=None),
        "completed": len(done),
        "failed": dict(Counter(sample.error for sample in samples if sample.error)),
        "latency": percentiles([sample.latency for sample in done]),
        "queue": percentiles([sample.queue for sample in done if sample.queue is not None]),
        "time_to_first_preview": percentiles(previews),
    }
    if deadline is not None:
        in_time = sum(sample.latency <= deadline for sample in done)
        found |= {"deadline": deadline, "share_within_deadline": in_time / len(samples) if samples else 0.0}
    return found


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
        f"{record['images']} images in {record['seconds']:.2f} s: {record['images_per_second']:.3f} images/s",
        f"the first image after {record['first_image'] or float('nan'):.2f} s",
    ]
    if record["failed"]:
        lines.append("failed: " + ", ".join(f"{count} {error}" for error, count in record["failed"].items()))
    if "deadline" in record:
        lines.append(f"within {record['deadline']:g} s: {record['share_within_deadline']:.1%}")
    if "one_call" in record:
        call = record["one_call"]
        lines.append(
            f"one call of generate: {call['images_per_second']:.3f} images/s; "
            f"the first after {call['first_image']:.2f} s"
        )
    return "\n".join(lines)


def write(folder: Path, record: dict[str, Any], samples: Sequence[Sample]) -> list[Path]:
    """Write serve.json, serve.csv and, where matplotlib is there, serve.html; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    rows = [sample.row() for sample in sorted(samples, key=lambda sample: sample.number)]
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
