"""A bench record as tables on a terminal: the model, ceilings, lines, ops, switches and notes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate

from blip3o_rt.measure.bench.compose import OURS
from blip3o_rt.measure.bench.rate import rate_text
from blip3o_rt.measure.bench.samples import median
from blip3o_rt.measure.units import memory_text, number_text, ratio_text, share_text, time_text

ABOVE_A_CEILING = (
    "a share above 100%: caches held the inputs, or the machine was busier while its ceilings were measured"
)
MOST_SHARE = 1.005  # 100% when rounded


def as_text(data: Mapping[str, Any]) -> str:
    """The record as tables: model and ceilings, lines, ops, ablations, notes."""
    sections = [
        f"{_model_text(data['model'])}\n{_ceiling_text(data['ceilings'])}".strip(),
        _table(_line_headers(data), line_rows(data["lines"])),
        _table(OP_HEADERS, op_rows(data["ops"])),
        _table(ABLATION_HEADERS, ablation_rows(data["ablations"])),
        "\n".join(_notes(data)),
        "" if data["complete"] else "interrupted: this is what had been measured until then",
    ]
    return "\n\n".join(filter(None, sections))


LINE_HEADERS = (
    "line",
    "batch",
    "who",
    "median",
    "p90",
    "min",
    "n",
    "cold",
    "rate",
    "of ceiling",
    "peak",
    "launches",
    "ours is",
)
CALLS_HEADER = "op calls"  # in the place of launches where there is no GPU
OP_HEADERS = (
    "op",
    "shape",
    "dtype",
    "implementation",
    "median",
    "n",
    "GB/s",
    "GFLOP/s",
    "of ceiling",
    "error",
    "bound",
    "check",
)
ABLATION_HEADERS = ("switch", "line", "off", "on", "time off", "time on", "gain")


def _line_headers(data: Mapping[str, Any]) -> list[str]:
    """Launches are those of a GPU; without one it is operators that are counted."""
    on_gpu = str(data["model"].get("device", "cpu")).startswith("cuda")
    return [CALLS_HEADER if header == "launches" and not on_gpu else header for header in LINE_HEADERS]


def _model_text(model: Mapping[str, Any]) -> str:
    """What was measured, in one line; a record may name less."""
    threads = model.get("threads")
    described = [model.get(key) for key in ("size", "dtype", "tier", "device")]
    described.append(f"{threads} thread{'' if threads == 1 else 's'}" if threads else None)
    return f"model: {', '.join(map(str, filter(None, described)))}"


def _ceiling_text(ceilings: Sequence[Mapping[str, Any]]) -> str:
    found = [
        f"{c['name']}{' ' + c['dtype'] if c['dtype'] else ''} {number_text(c['value'])} {c['unit']}"
        for c in ceilings
    ]
    return f"ceilings: {', '.join(found)}" if found else ""


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    return tabulate(rows, headers, disable_numparse=True)


def line_rows(lines: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Lines as text; a peer's last column says how many times faster ours is."""
    ours = {(line["name"], line["batch"]): line["median"] for line in lines if line["who"] == OURS}
    rows = []
    for line in lines:
        own = ours.get((line["name"], line["batch"]))
        compared = line["who"] != OURS and own and line["median"]
        calls = line["launches"] if line["launches"] is not None else line["operator_calls"]
        rows.append(
            [
                line["name"],
                str(line["batch"]),
                line["who"],
                *(time_text(line[key]) for key in ("median", "p90", "min")),
                str(line["n"]),
                time_text(line["cold"]),
                rate_text(line["name"], line["per"], line["median"]),
                f"{share_text(line['share'])} {line['ceiling'] or ''}".strip(),
                memory_text(line["peak_memory"]),
                f"{calls:,}" if calls is not None else "",
                ratio_text(line["median"] / own) if compared else "",
            ]
        )
    return rows


def op_rows(entries: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Ops as text."""
    return [
        [
            entry["op"],
            entry["shape"],
            entry["dtype"],
            entry["implementation"],
            time_text(entry["median"]),
            str(entry["n"]),
            _per_second(entry["bytes"], entry["median"]),
            _per_second(entry["flops"], entry["median"]),
            share_text(entry["share"]),
            f"{entry['error']:.1e}" if entry["error"] is not None else "",
            f"{entry['bound']:.1e}" if entry["bound"] is not None else "",
            "ok" if entry["ok"] else "WRONG",
        ]
        for entry in entries
    ]


def ablation_rows(entries: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Switches as text; the gain is how many times faster the line is with the switch on."""
    rows = []
    for entry in entries:
        times = [
            time_text(median(entry[key]) if entry[key] else None) for key in ("samples_off", "samples_on")
        ]
        labels = [entry[key] for key in ("switch", "line", "off", "on")]
        rows.append([*labels, *times, ratio_text(entry["ratio"])])
    return rows


def _notes(data: Mapping[str, Any]) -> list[str]:
    """Remarks on the run, and those of its lines, each once whatever the batch."""
    remarks = [f"{line['name']}, {line['who']}: {line['note']}" for line in data["lines"] if line["note"]]
    shares = [entry["share"] for entry in (*data["lines"], *data["ops"]) if entry["share"]]
    above = [ABOVE_A_CEILING] if max(shares, default=0.0) >= MOST_SHARE else []
    return [f"note: {text}" for text in dict.fromkeys([*data["notes"], *remarks, *above])]


def _per_second(amount: int | None, seconds: float | None) -> str:
    """In thousands of millions."""
    return number_text(amount / seconds / 1e9) if amount and seconds else ""
