"""Write docs/performance.md from the records in benchmarks/results: python -m benchmarks.render."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.targets import Standing, standings
from blip3o_rt.measure import tables
from blip3o_rt.measure.bench import windows
from blip3o_rt.measure.bench.lines import ORDER
from blip3o_rt.measure.records import (
    BenchRecord,
    line_notes,
    read_records,
    rows,
    slower_than,
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

A baseline's column is its median over ours on the same weights in the same run: above 1 we are faster.
*Utilization* is the time at the roofline over the median: MBU where memory bounds the work, MFU where
arithmetic does. Rooflines are measured in the same run.
"""
NO_GPU = "Not yet run on hardware: there are no records of a GPU. `make gpu` makes them."
NO_CPU = "There are no records of a processor yet."
HEADINGS = {"cuda": "GPU", "cpu": "Processor"}
MISSING = {"cuda": NO_GPU, "cpu": NO_CPU}


def page(results: Path = RESULTS) -> str:
    """The whole page."""
    folders = [folder for folder in sorted(results.glob("*")) if folder.is_dir()]
    found = {folder: (benches(folder), checks(folder), window_times(folder)) for folder in folders}
    sections = [INTRODUCTION]
    for device, heading in HEADINGS.items():
        sections.append(f"## {heading}\n")
        machines = [of for of in found.values() if any(of) and device_of(*of[:2]) == device]
        sections += [machine_section(*of, device) for of in machines]
        if not machines:
            sections += [f"{MISSING[device]}\n", targets_section(standings([], None, device))]
    return "\n".join(filter(None, sections)).replace("picture", "image")  # older records' word


def benches(folder: Path) -> list[BenchRecord]:
    return read_records(folder, "bench", BenchRecord.of)


def checks(folder: Path) -> list[dict[str, Any]]:
    return read_records(folder, "validate", dict)


def window_times(folder: Path) -> list[dict[str, Any]]:
    return read_records(folder, "windows", dict)


def device_of(found: Sequence[BenchRecord], checked: Sequence[Mapping[str, Any]]) -> str:
    """ "cuda" or "cpu": where the records of a machine ran."""
    devices = [record.device for record in found]
    devices += [str((record.get("model") or {}).get("device", "cpu")) for record in checked]
    return "cuda" if any(device.startswith("cuda") for device in devices) else "cpu"


def machine_section(
    found: Sequence[BenchRecord],
    checked: Sequence[Mapping[str, Any]],
    timed: Sequence[Mapping[str, Any]],
    device: str,
) -> str:
    """Everything measured on one machine."""
    key = "gpu" if device == "cuda" else "cpu"
    names = [record.machine.get(key) for record in found]
    names += [(record.get("machine") or {}).get(key) for record in checked]
    name = str(next(filter(None, names), "unnamed"))
    parts = [f"### {name}\n", targets_section(standings(found, name, device))]
    for model in dict.fromkeys(map(model_key, found)):
        parts.append(model_section(model, [record for record in found if model_key(record) == model]))
    parts += map(windows_section, timed)
    if checked:
        parts.append(validation_section(checked))
    return "\n".join(part for part in parts if part)


def model_key(record: BenchRecord) -> str:
    """Model, dtype, tier and switches in words: records that differ in them do not stand in one table."""
    switches = ", ".join(f"{name}={setting}" for name, setting in record.switches.items())
    size, dtype, tier = (record.model.get(key, "") for key in ("size", "dtype", "tier"))
    return f"{size}, {dtype}, tier {tier}" + (f": {switches}" if switches else "")


def model_section(key: str, records: Sequence[BenchRecord]) -> str:
    """One model and dtype on one machine: provenance, stages, rooflines, switches, ops."""
    parts = [f"#### {key}\n", "\n".join(dict.fromkeys(map(provenance, records))) + "\n"]
    table = rows(records, ORDER)
    if table:
        parts.append(markdown(tables.comparison(table)))
        parts += [f"* {note}.\n" for note in line_notes(line for row in table for line in row.lines.values())]
        parts += [f"* Slower than a baseline: {line}.\n" for line in slower_than(table)]
    rooflines = next((record.rooflines for record in reversed(records) if record.rooflines), [])
    if rooflines:
        parts.append(f"Measured {tables.roofline_text(rooflines)}.\n")
    parts.append(markdown(tables.ablation_table(entry for record in records for entry in record.ablations)))
    parts.append(markdown(tables.op_table(next((r.ops for r in reversed(records) if r.ops), []))))
    if not records[-1].complete:
        parts.append("The newest of these runs was not finished.\n")
    return "\n".join(part for part in parts if part)


def provenance(record: BenchRecord) -> str:
    """Command, machine, versions, commit and date of a record in one line."""
    machine, threads = record.machine, record.model.get("threads")
    facts = [
        f"{machine.get('cpu')}, {machine.get('cores')} cores" if machine.get("cpu") else "",
        f"driver {machine['driver']}" if machine.get("driver") else "",
        f"{threads} threads" if threads else "",
        ", ".join(f"{name} {value}" for name, value in record.versions.items() if value),
        f"commit {record.commit}" if record.commit else "",
        record.created[:10],
    ]
    return f"* `{' '.join(record.command)}`: {'; '.join(filter(None, facts))}"


def validation_section(checked: Iterable[Mapping[str, Any]]) -> str:
    """How many checks of each validation passed, and which did not."""
    parts = ["#### Validation\n"]
    for record in checked:
        found = record.get("lines") or []
        failed = [line for line in found if line.get("passed") is not True]
        command = " ".join(map(str, record.get("command") or ()))
        parts.append(f"* `{command}`: {len(found) - len(failed)} of {len(found)} checks passed.")
        for line in failed:
            parts.append(f"  * failed: {line.get('group')}, {line.get('name')}, {line.get('dtype')}")
    return "\n".join(parts) + "\n"


def windows_section(record: Mapping[str, Any]) -> str:
    """Several tokens a pass: images by window, and a pass by its rows."""
    model, command = record["model"], " ".join(map(str, record["command"]))
    by_window, by_rows = windows.tables(record)
    parts = [
        f"#### Several tokens a pass: {model['size']}, {model['dtype']}\n",
        f"* `{command}`: {model['threads']} threads; commit {record['commit']}; {record['created'][:10]}\n",
        markdown(by_window),
        markdown(by_rows),
        f"{windows.COMPUTED}\n",
    ]
    return "\n".join(filter(None, parts))


def targets_section(found: Sequence[Standing]) -> str:
    """What is to be reached on a machine, and what is."""
    headers = ["target, published size in bf16", "wanted", "measured", ""]
    return markdown(
        (headers, [[s.target.label, s.target.bound, s.target.text(s.value), s.word] for s in found])
    )


def markdown(table: tables.Table) -> str:
    """A table of the page; empty without rows."""
    text = tables.formatted(table, "github")
    return text + "\n" if text else ""


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
