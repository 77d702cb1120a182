"""The page of a bench record: stages with ratios and utilization, rooflines, plots, switches and ops."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blip3o_rt.measure import tables
from blip3o_rt.measure.bench.lines import ORDER
from blip3o_rt.measure.records import BenchRecord, baselines, rows
from blip3o_rt.measure.reports import plots
from blip3o_rt.measure.reports.page import data_uri, write_page

NO_PLOTS = "Plots need matplotlib: pip install 'blip3o_rt[bench]'."
PLOTS = {
    "roofline": plots.roofline,
    "breakdown": plots.breakdown,
    "distribution": plots.distribution,
    "scaling": plots.batch_scaling,
    "ablation": plots.ablation,
}


def bench_html(data: Mapping[str, Any] | BenchRecord, path: str | Path) -> None:
    """Write the page of a bench record, in one file that needs nothing else.

    A record that is partial, or lacks parts, gives a page that says in words what is missing.
    """
    record = data if isinstance(data, BenchRecord) else BenchRecord.of(data)
    table = rows([record], ORDER)
    context = {
        "title": "blip3o-rt bench",
        "subtitle": subtitle(record),
        "complete": record.complete,
        "provenance": list(tables.provenance(record)),
        "record": record.to_json() if isinstance(data, BenchRecord) else data,
        "alone": not baselines(table),
        "numbers": tables.RIGHT | set(baselines(table)),
        "stages": tables.comparison(table),
        "details": tables.details(record.lines),
        "notes": tables.notes(record),
        "rooflines": tables.roofline_table(record.rooflines),
        "ablations": tables.ablation_table(record.ablations),
        "ops": tables.op_table(record.ops),
        "no_plots": None if plots.available() else NO_PLOTS,
        "plots": draw(record),
    }
    write_page("bench.html", path, context)


def subtitle(record: BenchRecord) -> str:
    """Model, dtype and where it ran, in one line."""
    size = f"the {record.model['size']} model" if record.model.get("size") else "a model that is not named"
    dtype = f", {record.model['dtype']}" if record.model.get("dtype") else ""
    text = f"{size}{dtype}, on {record.machine_name or 'a machine that is not named'}"
    return text[:1].upper() + text[1:]


def draw(record: BenchRecord) -> dict[str, str | None]:
    """Every plot by name as the address of an <img>; None where there is nothing to plot, or to plot with."""
    if not plots.available():
        return dict.fromkeys(PLOTS)
    drawn = {name: plot(record) for name, plot in PLOTS.items()}
    return {name: data_uri(svg, ".svg") if svg else None for name, svg in drawn.items()}
