"""A bench record as tables: headers and rows of text, the same for a terminal, Markdown and a page."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from tabulate import tabulate

from blip3o_rt.measure.bench.lines import rate_text
from blip3o_rt.measure.records import (
    OURS,
    Ablation,
    BenchRecord,
    Line,
    OpTime,
    Record,
    Roofline,
    Row,
    baselines,
    line_notes,
    median,
    shape_text,
)
from blip3o_rt.measure.units import memory_text, number_text, ratio_text, share_text, significant, time_text

Table = tuple[Sequence[str], list[list[str]]]
ABOVE = (
    "a utilization above 100%: caches held the inputs, or the machine was busier while its rooflines were "
    "measured"
)
MOST = 1.005  # 100% when rounded
RIGHT = {  # columns of numbers
    *(
        "batch",
        "median",
        "p90",
        "fastest",
        "n",
        "cold",
        "rate",
        "peak memory",
        "launches",
        "op calls",
        "ratio",
    ),
    *("ours", "GB/s", "GFLOP/s", "error", "bound", "value", "samples", "off takes", "on takes", "host"),
}


def utilization_text(utilization: float | None, roofline: str | None) -> str:
    """85% MBU (read), 93% MFU (matmul bf16); empty for None."""
    if utilization is None or roofline is None:
        return share_text(utilization)
    return f"{share_text(utilization)} {'MFU' if roofline.startswith('matmul') else 'MBU'} ({roofline})"


def details(lines: Iterable[Line]) -> Table:
    """A row for each candidate of each line; a baseline's ratio is its time over ours."""
    lines = list(lines)
    ours = {(line.name, line.batch): line.median for line in lines if line.who == OURS}
    calls = "launches" if any(line.launches is not None for line in lines) else "op calls"
    headers = ["line", "batch", "who", "median", "p90", "fastest", "n", "cold", "host", "rate", "utilization"]
    rows = []
    for line in lines:
        own = ours.get((line.name, line.batch))
        ratio = line.median / own if line.who != OURS and own and line.median else None
        count = line.launches if line.launches is not None else line.operator_calls
        times = [time_text(line.median), time_text(line.p90), time_text(line.fastest), str(line.count or "")]
        times += [time_text(line.cold), time_text(line.host), rate_text(line)]
        rows.append(
            [
                *(line.name, f"{line.batch:.0f}", line.who, *times),
                utilization_text(line.utilization, line.roofline),
                memory_text(line.peak_memory),
                "" if count is None else f"{count:,.0f}",
                ratio_text(ratio),
            ]
        )
    return [*headers, "peak memory", calls, "ratio"], rows


def comparison(table: Sequence[Row]) -> Table:
    """A row for each stage: ours, and how many times our time each baseline takes."""
    others = baselines(table)
    headers = [
        "line",
        "a call is",
        "batch",
        "ours",
        "p90",
        "n",
        "utilization",
        *others,
        "rate",
        "peak memory",
    ]
    rows = []
    for row in table:
        line = row.ours or Line()
        times = [time_text(line.median), time_text(line.p90), str(line.count or "")]
        if line.composed:  # no run of its own
            times = [f"{time_text(line.median)} (composed)", "", ""]
        compared = [ratio_text(row.ratio(who)) for who in others]
        work = [utilization_text(line.utilization, line.roofline), *compared]
        ends = [rate_text(line) if row.ours else "", memory_text(line.peak_memory)]
        rows.append([row.name, row.what, f"{row.batch:.0f}", *times, *work, *ends])
    return [*headers, "rate", "peak memory"], rows


def op_table(ops: Iterable[OpTime]) -> Table:
    headers = ["op", "implementation", "dtype", "shape", "median", "p90", "n", "GB/s", "GFLOP/s"]
    rows = [
        [
            *(op.op, op.implementation, op.dtype, shape_text(op.shape)),
            *(time_text(op.median), time_text(op.p90), str(op.count or "")),
            *(_per_second(op.bytes, op.median), _per_second(op.flops, op.median)),
            utilization_text(op.utilization, op.roofline),
            "" if op.error is None else significant(op.error, 2),
            "" if op.bound is None else significant(op.bound, 2),
            "" if op.ok is None else "ok" if op.ok else "WRONG",
        ]
        for op in ops
    ]
    return [*headers, "utilization", "error", "bound", "check"], rows


def _per_second(amount: float | None, seconds: float | None) -> str:
    """In thousands of millions."""
    return number_text(amount / seconds / 1e9) if amount and seconds else ""


def ablation_table(ablations: Iterable[Ablation]) -> Table:
    """The ratio is how many times faster the line is with the switch on."""
    headers = ["switch", "line", "off", "on", "off takes", "on takes", "ratio"]
    rows = []
    for entry in ablations:
        times = [time_text(median(s) if s else None) for s in (entry.samples_off, entry.samples_on)]
        rows.append([entry.switch, entry.line, entry.off, entry.on, *times, ratio_text(entry.ratio)])
    return headers, rows


def roofline_table(rooflines: Iterable[Roofline]) -> Table:
    headers = ["roofline", "dtype", "value", "unit", "samples"]
    return headers, [
        [r.name, r.dtype or "", number_text(r.value), r.unit, str(len(r.samples) or "")] for r in rooflines
    ]


def roofline_text(rooflines: Iterable[Roofline]) -> str:
    """rooflines: read 31.2 GB/s, matmul bf16 436 GFLOP/s; empty for none."""
    found = ", ".join(f"{r.key} {number_text(r.value)} {r.unit}" for r in rooflines)
    return f"rooflines: {found}" if found else ""


def notes(record: BenchRecord) -> list[str]:
    """Remarks on the run and on its lines, each once whatever the batch."""
    timed: list[Line | OpTime] = [*record.lines, *record.ops]
    measured = [entry.utilization or 0.0 for entry in timed]
    above = [ABOVE] if max(measured, default=0.0) >= MOST else []
    return list(dict.fromkeys([*record.notes, *line_notes(record.lines), *above]))


def model_text(model: Mapping[str, object]) -> str:
    """What was measured, in one line; a record may name less."""
    threads = model.get("threads")
    described = [model.get(key) for key in ("size", "dtype", "tier", "device")]
    described.append(f"{threads} thread{'' if threads == 1 else 's'}" if threads else None)
    return f"model: {', '.join(map(str, filter(None, described)))}"


def provenance(record: Record) -> Iterator[tuple[str, str]]:
    """What produced the record, as (label, text); what it does not say is left out."""
    machine, model = record.machine, record.model
    gpu, memory = machine.get("gpu"), machine.get("memory_bytes")
    driver = f", driver {machine['driver']}" if machine.get("driver") else ""
    cores = f", {machine['cores']} cores" if machine.get("cores") else ""
    switches = (
        f"{name} = {_setting(value)}" for name, value in (model.get("switches") or {}).items() if value
    )
    labelled = {
        "model": ", ".join(filter(None, [model.get("size"), model.get("dtype")])),
        "tier": model.get("tier"),
        "device": model.get("device"),
        "threads": model.get("threads"),
        "switches": "; ".join(switches),
        "GPU": f"{gpu}{driver}" if gpu else "none" if machine else None,
        "processor": f"{machine['cpu']}{cores}" if machine.get("cpu") else None,
        "instruction sets": ", ".join(machine.get("instruction_sets") or ()),
        "memory": memory_text(memory) if isinstance(memory, int | float) else None,
        "versions": ", ".join(f"{name} {value}" for name, value in record.versions.items() if value),
        "commit": record.commit,
        "made": record.created,
        "command": " ".join(record.command),
    }
    return ((label, str(text)) for label, text in labelled.items() if text not in (None, ""))


def _setting(value: object) -> str:
    """A switch's setting in words; where it is one per op, each with its op."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {setting}" for key, setting in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def formatted(table: Table, form: str = "simple") -> str:
    """A table of a terminal ("simple") or of Markdown ("github"); empty without rows."""
    headers, rows = table
    if not rows:
        return ""
    if form == "github":  # cells that hold a bar cannot break it
        rows = [[cell.replace("|", "\\|") for cell in cells] for cells in rows]
    return tabulate(rows, headers, tablefmt=form, disable_numparse=True)


def as_text(record: BenchRecord) -> str:
    """The record for a terminal: model and rooflines, lines, ops, ablations, notes."""
    sections = [
        f"{model_text(record.model)}\n{roofline_text(record.rooflines)}".strip(),
        *map(formatted, (details(record.lines), op_table(record.ops), ablation_table(record.ablations))),
        "\n".join(f"note: {text}" for text in notes(record)),
        "" if record.complete else "interrupted: this is what had been measured until then",
    ]
    return "\n\n".join(filter(None, sections))
