"""The page of a bench record: stages with ratios and shares, ceilings, plots, switches and ops."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from blip3o_rt.measure.reports import plots
from blip3o_rt.measure.reports.page import data_uri, write_page
from blip3o_rt.measure.reports.reading import (
    Line,
    Record,
    Row,
    entries,
    notes,
    number,
    peers,
    provenance,
    rows,
)
from blip3o_rt.measure.units import (
    memory_text,
    number_text,
    ratio_text,
    share_text,
    significant,
    time_text,
)

NO_PLOTS = "Plots need matplotlib: pip install 'blip3o_rt[bench]'."
DETAILS = ("median", "p90", "fastest", "n", "cold call", "rate", "peak memory", "launches", "operator calls")
PLOTS = {
    "roofline": plots.roofline,
    "breakdown": plots.breakdown,
    "distribution": plots.distribution,
    "scaling": plots.batch_scaling,
    "ablation": plots.ablation,
}


def bench_html(record: dict[str, Any], path: str | Path) -> None:
    """Write the page of a bench record, in one file that needs nothing else.

    A record that is partial, or lacks parts, gives a page that says in words what is missing.
    """
    table = rows(record)
    others = peers(table)
    context = {
        "title": "blip3o-rt bench",
        "subtitle": subtitle(record),
        "complete": record.get("complete", True),
        "provenance": provenance(record),
        "record": record,
        "peers": others,
        "details": DETAILS,
        "stages": [stage_row(row, others) for row in table],
        "notes": [*map(str, record.get("notes") or ()), *notes(table)],
        "ceilings": [ceiling_row(entry) for entry in entries(record, "ceilings")],
        "ablations": [ablation_row(entry) for entry in entries(record, "ablations")],
        "ops": [op_row(entry) for entry in entries(record, "ops")],
        "no_plots": None if plots.available() else NO_PLOTS,
        "plots": draw(record),
    }
    write_page("bench.html", path, context)


def subtitle(record: Record) -> str:
    """Model, dtype and where it ran, in one line."""
    model, machine = record.get("model") or {}, record.get("machine") or {}
    size = f"the {model['size']} model" if model.get("size") else "a model that the record does not name"
    on = machine.get("gpu") if str(model.get("device", "")).startswith("cuda") else machine.get("cpu")
    dtype = f", {model['dtype']}" if model.get("dtype") else ""
    text = f"{size}{dtype}, on {on or 'a machine that the record does not name'}"
    return text[:1].upper() + text[1:]


def draw(record: Record) -> dict[str, str | None]:
    """Every plot by name as the address of an <img>; None where there is nothing to plot, or to plot with."""
    if not plots.available():
        return dict.fromkeys(PLOTS)
    drawn = {name: plot(record) for name, plot in PLOTS.items()}
    return {name: data_uri(svg, ".svg") if svg else None for name, svg in drawn.items()}


def stage_row(row: Row, others: Sequence[str]) -> dict[str, Any]:
    """The cells of a stage; empty where nothing was measured."""
    ours = row.ours
    compared = [(row.lines.get(who), row.ratio(who)) for who in others]
    return {
        "name": row.name,
        "what": row.what,
        "batch": row.batch,
        "time": time_text(ours.median) if ours else "",
        "share": share_text(ours.share) if ours else "",
        "ceiling": (ours.ceiling or "") if ours else "",
        "peers": [(time_text(line.median) if line else "", ratio_text(r)) for line, r in compared],
        "details": detail_cells(ours) if ours else [],
    }


def detail_cells(line: Line) -> list[str]:
    """The cells below DETAILS."""
    return [
        *map(time_text, (line.median, line.p90, line.least)),
        str(line.count or ""),
        time_text(line.cold),
        line.rate_text,
        memory_text(line.peak_memory),
        *("" if count is None else f"{count:,.0f}" for count in (line.launches, line.operator_calls)),
    ]


def ceiling_row(entry: Mapping[str, Any]) -> tuple[str, str, str, str, str]:
    value = number(entry, "value")
    return (
        str(entry.get("name", "")),
        str(entry.get("dtype") or ""),
        number_text(value),
        str(entry.get("unit", "")),
        str(len(entry.get("samples") or ()) or ""),
    )


def ablation_row(entry: Mapping[str, Any]) -> tuple[str, ...]:
    off, on = (median_of(entry, key) for key in ("samples_off", "samples_on"))
    return (
        str(entry.get("switch", "")),
        str(entry.get("line", "")),
        str(entry.get("off", "")),
        str(entry.get("on", "")),
        time_text(off),
        time_text(on),
        ratio_text(number(entry, "ratio")),
    )


def median_of(entry: Mapping[str, Any], key: str) -> float | None:
    samples = entry.get(key) or ()
    return statistics.median(samples) if samples else None


def op_row(entry: Mapping[str, Any]) -> dict[str, Any]:
    line = plots.op_line(entry)
    moved = line.bytes / line.median / 1e9 if line.bytes and line.median else None
    computed = line.flops / line.median / 1e9 if line.flops and line.median else None
    error, bound = number(entry, "error"), number(entry, "bound")
    return {
        "op": str(entry.get("op", "")),
        "implementation": str(entry.get("implementation", "")),
        "dtype": str(entry.get("dtype") or ""),
        "shape": shape_text(entry.get("shape")),
        "numbers": [
            time_text(line.median),
            time_text(line.p90),
            str(line.count or ""),
            number_text(moved),
            number_text(computed),
            share_text(line.share),
        ],
        "ceiling": line.ceiling or "",
        "error": "" if error is None else significant(error, 2),
        "bound": "" if bound is None else significant(bound, 2),
        "ok": entry.get("ok"),
    }


def shape_text(shape: object) -> str:
    """A shape as it is read: text as it is, a list as 2 x 1024 x 64."""
    if isinstance(shape, list | tuple):
        return " x ".join(str(side) for side in shape)
    return "" if shape is None else str(shape)
