"""The page of a load: the table, the distribution of latency, and every request over time."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np

from blip3o_rt.measure.serve.load import Sample

matplotlib.use("svg")

from matplotlib.figure import Figure

BLUE, ORANGE, RED = "#0072b2", "#e69f00", "#d55e00"
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>blip3o-rt bench serve</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 1rem auto; padding: 0 1rem }}
svg {{ max-width: 100%; height: auto }} pre {{ overflow-x: auto }}</style></head>
<body><h1>Load on {url}</h1><p>{what}</p><pre>{table}</pre>{figures}</body></html>
"""


def page(record: dict[str, Any], samples: Sequence[Sample], table: str) -> str:
    """The record as a page without any other file; `table` is its numbers as text."""
    load = record["load"]
    what = f"{load['requests']} requests, {load['loop']} loop"
    what += f" of {load['concurrency']} clients" if load["concurrency"] else f" at {load['rate']:g} a second"
    figures = "".join(
        f"<h2>{title}</h2><figure>{_svg(figure)}</figure>"
        for title, figure in (("Latency", _latency(samples)), ("Requests over time", _timeline(samples)))
    )
    return PAGE.format(
        url=html.escape(load["url"]), what=html.escape(what), table=html.escape(table), figures=figures
    )


def _latency(samples: Sequence[Sample]) -> Figure:
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    axes = figure.subplots()
    done = [sample for sample in samples if not sample.error]
    first = [sample.preview - sample.sent for sample in done if sample.preview is not None]
    for values, name, color in (
        (first, "first preview", ORANGE),
        ([s.latency for s in done], "last image", BLUE),
    ):
        if values:
            share = np.arange(1, len(values) + 1) / len(values)
            axes.step(np.sort(values), share, where="post", color=color, label=name)
    axes.set(xlabel="seconds", ylabel="share of requests", ylim=(0, 1))
    axes.grid(visible=True, color="#dddddd")
    if axes.has_data():
        axes.legend()
    return figure


def _timeline(samples: Sequence[Sample]) -> Figure:
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    axes = figure.subplots()
    for place, sample in enumerate(samples):
        color = RED if sample.error else BLUE
        axes.plot([sample.sent, sample.ended], [place] * 2, color=color, linewidth=1.5)
        if sample.preview is not None:
            axes.plot(sample.preview, place, ".", color=ORANGE)
    axes.set(xlabel="seconds since the round began", ylabel="request")
    axes.grid(visible=True, axis="x", color="#dddddd")
    return figure


def _svg(figure: Figure) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg")
    return file.getvalue().partition("<svg")[1] + file.getvalue().partition("<svg")[2]
