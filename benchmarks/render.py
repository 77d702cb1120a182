"""Write docs/performance.md from the records in benchmarks/results: python -m benchmarks.render."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks.targets import Standing, newest_rows, read_records, slower_than, standings
from blip3o_rt.measure.reports.reading import Record, Row, entries, notes, number, peers, set_apart
from blip3o_rt.measure.units import (
    memory_text,
    number_text,
    ratio_text,
    share_text,
    significant,
    time_text,
)

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"

INTRODUCTION = """\
<!-- Written by `python -m benchmarks.render` from the records in benchmarks/results. Do not edit. -->

# Performance

Every figure here comes from a record in `benchmarks/results/`, which holds each of its samples, the machine,
the versions, the commit and the command. A blank was not measured. [bench.md](bench.md) says how a record is
made, [benchmarks/README.md](../benchmarks/README.md) how this page is.

A peer's column is its median over ours on the same weights in the same run: above 1 we are faster. *Share* is
that of the ceiling (memory or matrix products) which bounds the work, measured in the same run.
"""
NO_GPU = "Not yet run on hardware: there are no records of a GPU. `make gpu` makes them."
NO_CPU = "There are no records of a processor yet."
HEADINGS = {"cuda": "GPU", "cpu": "Processor"}
MISSING = {"cuda": NO_GPU, "cpu": NO_CPU}


def page(results: Path = RESULTS) -> str:
    """The whole page."""
    sections = [INTRODUCTION]
    for device, heading in HEADINGS.items():
        sections.append(f"## {heading}\n")
        folders = [folder for folder in machines(results) if device_of(folder) == device]
        for folder in folders:
            sections.append(machine_section(folder, device))
        if not folders:
            sections.append(f"{MISSING[device]}\n")
            sections.append(targets_section(standings([], None, device)))
    return "\n".join(section for section in sections if section)


def machines(results: Path) -> list[Path]:
    """Folders that hold a record, by name."""
    if not results.is_dir():
        return []
    return [folder for folder in sorted(results.iterdir()) if folder.is_dir() and records_of(folder)]


def records_of(folder: Path) -> list[dict[str, Any]]:
    """Its bench records, then its validate records."""
    return read_records(folder, "bench") + read_records(folder, "validate")


def device_of(folder: Path) -> str:
    """ "cuda" or "cpu": where the records of the folder ran."""
    devices = {str((record.get("model") or {}).get("device", "cpu")) for record in records_of(folder)}
    return "cuda" if any(device.startswith("cuda") for device in devices) else "cpu"


def machine_name(records: Sequence[Record], device: str) -> str:
    machines = [record.get("machine") or {} for record in records]
    names = [machine.get("gpu" if device == "cuda" else "cpu") for machine in machines]
    return str(next(filter(None, names), "unnamed"))


def machine_section(folder: Path, device: str) -> str:
    """Everything measured on one machine."""
    benches, checks = read_records(folder, "bench"), read_records(folder, "validate")
    name = machine_name(benches + checks, device)
    parts = [f"### {name}\n", targets_section(standings(benches, name, device))]
    for key in dict.fromkeys(map(model_key, benches)):
        parts.append(model_section(key, [record for record in benches if model_key(record) == key]))
    if checks:
        parts.append(validation_section(checks))
    return "\n".join(part for part in parts if part)


def model_key(record: Record) -> str:
    """Model, dtype, tier and switches in words: records that differ in them do not stand in one table."""
    model = record.get("model") or {}
    switches = ", ".join(f"{name}={setting}" for name, setting in set_apart(model).items())
    words = f"{model.get('size', '')}, {model.get('dtype', '')}, tier {model.get('tier', '')}"
    return f"{words}: {switches}" if switches else words


def model_section(key: str, records: Sequence[Record]) -> str:
    """One model and dtype on one machine: provenance, stages, ceilings, switches, ops."""
    parts = [f"#### {key}\n", provenance_lines(records)]
    table = newest_rows(records)
    if table:
        parts.append(stage_table(table))
        parts += [f"* {note}.\n" for note in notes(table)]
        parts += [f"* Slower than a peer: {line}.\n" for line in slower_than(table)]
    newest = records[-1]
    ceilings = next((entries(r, "ceilings") for r in reversed(records) if entries(r, "ceilings")), [])
    if ceilings:
        parts.append("Ceilings: " + ", ".join(map(ceiling_text, ceilings)) + ".\n")
    ablations = [entry for record in records for entry in entries(record, "ablations")]
    if ablations:
        parts.append(ablation_table(ablations))
    ops = next((entries(r, "ops") for r in reversed(records) if entries(r, "ops")), [])
    if ops:
        parts.append(op_table(ops))
    if not newest.get("complete", True):
        parts.append("The newest of these runs was not finished.\n")
    return "\n".join(parts)


def provenance_lines(records: Sequence[Record]) -> str:
    """Machine, versions, commit and command of the records, the same ones said once."""
    lines = []
    for record in records:
        machine, versions = record.get("machine") or {}, record.get("versions") or {}
        model = record.get("model") or {}
        facts = [
            f"{machine.get('cpu')}, {machine.get('cores')} cores" if machine.get("cpu") else "",
            f"driver {machine['driver']}" if machine.get("driver") else "",
            f"{model['threads']} threads" if model.get("threads") else "",
            ", ".join(f"{name} {value}" for name, value in versions.items() if value),
            f"commit {record['commit']}" if record.get("commit") else "",
            str(record.get("created", ""))[:10],
        ]
        lines.append(
            f"* `{' '.join(map(str, record.get('command') or ()))}`: {'; '.join(filter(None, facts))}"
        )
    return "\n".join(dict.fromkeys(lines)) + "\n"


def stage_table(table: Sequence[Row]) -> str:
    """Stages with ours, the share of the ceiling, and each peer's ratio.

    A picture that was added up from its stages says so, and has neither runs of its own nor a p90 of them.
    """
    others = peers(table)
    headers = ["stage", "batch", "ours", "p90", "n", "share", "of", *others, "rate", "peak memory"]
    body = []
    for row in table:
        line = row.ours
        cells = ["", "", "", "", ""]
        rate, memory = "", ""
        if line is not None:
            cells = [time_text(line.median), time_text(line.p90), str(line.count or "")]
            if line.composed:
                cells = [f"{time_text(line.median)} (composed)", "", ""]
            cells += [share_text(line.share), line.ceiling or ""]
            rate = line.rate_text
            memory = memory_text(line.peak_memory)
        ratios = [ratio_text(row.ratio(who)) for who in others]
        body.append([row.name, str(row.batch), *cells, *ratios, rate, memory])
    return markdown(headers, body)


def ceiling_text(entry: Mapping[str, Any]) -> str:
    name = " ".join(str(part) for part in (entry.get("name"), entry.get("dtype")) if part)
    return f"{name} {number_text(number(entry, 'value'))} {entry.get('unit', '')}"


def ablation_table(ablations: Sequence[Mapping[str, Any]]) -> str:
    """What each switch is worth, alone."""
    headers = ["switch", "stage", "off", "on", "time off over time on"]
    body = [
        [
            *(str(entry.get(key) or "") for key in ("switch", "line", "off", "on")),
            ratio_text(number(entry, "ratio")),
        ]
        for entry in ablations
    ]
    return markdown(headers, body)


def op_table(ops: Sequence[Mapping[str, Any]]) -> str:
    """Each op alone, its inputs out of the cache."""
    headers = ["op", "implementation", "dtype", "shape", "median", "share", "of", "error", "bound"]
    body = []
    for entry in ops:
        error, bound = number(entry, "error"), number(entry, "bound")
        body.append(
            [
                *(str(entry.get(key) or "") for key in ("op", "implementation", "dtype", "shape")),
                time_text(number(entry, "median")),
                share_text(number(entry, "share")),
                str(entry.get("ceiling") or ""),
                "" if error is None else significant(error, 2),
                "" if bound is None else significant(bound, 2),
            ]
        )
    return markdown(headers, body)


def validation_section(checks: Sequence[Record]) -> str:
    """How many checks of each validation passed, and which did not."""
    lines = ["#### Validation\n"]
    for record in checks:
        found = entries(record, "lines")
        failed = [line for line in found if line.get("passed") is not True]
        command = " ".join(map(str, record.get("command") or ()))
        lines.append(f"* `{command}`: {len(found) - len(failed)} of {len(found)} checks passed.")
        for line in failed:
            lines.append(f"  * failed: {line.get('group')}, {line.get('name')}, {line.get('dtype')}")
    return "\n".join(lines) + "\n"


def targets_section(found: Sequence[Standing]) -> str:
    """What is to be reached on a machine, and what is."""
    if not found:
        return ""
    headers = ["target, published size in bf16", "wanted", "measured", ""]
    body = [[s.target.label, s.target.bound, s.target.text(s.value), s.word] for s in found]
    return markdown(headers, body)


def markdown(headers: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table; cells that hold a bar cannot break it."""
    safe = [[cell.replace("|", "\\|") for cell in cells] for cells in body]
    return tabulate(safe, headers, tablefmt="github", disable_numparse=True) + "\n"


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
