"""The performance page says what the records say, and the committed page is the one they give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import render
from benchmarks.targets import standings, targets
from blip3o_rt.measure.records import BenchRecord, rows, slower_than
from tests.measure.reports.records import bench_record, validate_record


def write(record: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{record['kind']}.json").write_text(json.dumps(record))


def on_gpu(record: dict[str, Any], name: str) -> dict[str, Any]:
    machine = {**record["machine"], "gpu": name, "driver": "580.1"}
    return {**record, "machine": machine, "model": {**record["model"], "device": "cuda:0"}}


def median(record: dict[str, Any], name: str, who: str) -> float:
    lines = record["lines"]
    return next(x["median"] for x in lines if (x["name"], x["who"], x["batch"]) == (name, who, 1))


def row(page: str, *beginning: str) -> list[str]:
    """The cells of the one table row that begins like this."""
    tables = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if "|" in line
    ]
    found = [cells for cells in tables if cells[: len(beginning)] == list(beginning)]
    assert len(found) == 1, found
    return found[0]


def test_without_records_everything_is_blank(tmp_path: Path) -> None:
    page = render.page(tmp_path / "nothing")
    assert "Not yet run on hardware" in page
    assert "There are no records of a processor yet." in page
    for target in targets():
        assert row(page, target.label)[2:] == ["", "not measured"]


def test_memory_is_ours_beside_that_of_a_baseline(tmp_path: Path) -> None:
    record = bench_record()
    for line in record["lines"]:
        if line["name"] == "dit.step":
            line["peak_memory"] = 3 * 2**30 if line["who"] == "ours" else 4 * 2**30
        if line["name"] == "vae.decode" and line["who"] == "diffusers":
            line["peak_memory"] = None
    write(record, tmp_path / "imaginary")
    page = render.page(tmp_path)
    assert row(page, "memory of a denoising step beside diffusers")[1:] == ["at most 100%", "75%", "met"]
    assert row(page, "memory of decoding a latent beside diffusers")[2:] == ["", "not measured"]


def test_figures_are_those_of_the_record(tmp_path: Path) -> None:
    record = bench_record()
    write(record, tmp_path / "imaginary")
    write(validate_record(tmp_path), tmp_path / "imaginary" / "validate")
    page = render.page(tmp_path)
    assert "Not yet run on hardware" in page
    assert "### Imaginary 9000" in page
    ratio = median(record, "dit.step", "diffusers") / median(record, "dit.step", "ours")
    assert f"{ratio:.2f}x" in row(page, "dit.step", "one guided step", "1")
    target = row(page, "a denoising step beside diffusers")
    assert target[1:] == ["at least 1.45x", f"{ratio:.2f}x", "met" if ratio >= 1.45 else "falls short"]
    assert "5 of 6 checks passed." in page
    assert "failed: ops, silu_mul, bf16" in page
    assert row(page, "native row_linear")[-1] == "1.55x"
    assert "rooflines: read 31.2 GB/s, copy 33.0 GB/s, matmul fp32 200 GFLOP/s" in page
    assert row(page, "silu_mul", "cpu")[-3:] == ["0.020", "0.010", "WRONG"]


def test_a_gpu_has_its_own_section_and_targets(tmp_path: Path) -> None:
    write(on_gpu(bench_record(), "NVIDIA H200"), tmp_path / "h200" / "bench-ar")
    page = render.page(tmp_path)
    assert "Not yet run on hardware" not in page
    assert page.index("### NVIDIA H200") < page.index("## Processor")
    assert row(page, "a decoded token, H200")[-1] == "falls short"
    write(on_gpu(bench_record(), "NVIDIA H100"), tmp_path / "h200" / "bench-ar")
    assert "a decoded token, H200" not in render.page(tmp_path)


def test_the_newest_of_several_records_counts_with_its_baselines() -> None:
    old = {**bench_record(), "created": "2026-01-01"}
    line = next(line for line in old["lines"] if line["name"] == "dit.step")
    new = {"created": "2026-01-02", "lines": [{**line, "median": 10.0}]}
    table = {found.name: found for found in rows(map(BenchRecord.of, (old, new))) if found.batch == 1}
    assert list(table["dit.step"].lines) == ["ours"]
    assert table["dit.step"].ours is not None
    assert table["dit.step"].ours.median == 10.0
    assert set(table["ar.token"].lines) >= {"ours", "transformers"}


def test_targets_are_judged_on_the_size_and_dtype_they_are_about() -> None:
    record = bench_record()
    found = {s.target.name: s for s in standings([BenchRecord.of(record)], "Imaginary 9000", "cpu")}
    assert found["a decoded token beside transformers"].word == "met"
    other = {**record, "model": {**record["model"], "size": "shapes"}}
    assert {s.word for s in standings([BenchRecord.of(other)], "Imaginary 9000", "cpu")} == {"not measured"}


def test_other_switches_are_another_table(tmp_path: Path) -> None:
    """And no figure of a target that is about other switches, or about graphs."""
    record = bench_record()
    fast = {"ar_weights": "int8", "dit_weights": "fp8"}
    for folder, tier, switches in (
        ("exact", "exact", {"graphs": "on"}),
        ("eager", "exact", {"graphs": "off"}),
        ("fast", "fast", fast),
        ("faster", "fast", fast | {"step_cache": "2"}),
    ):
        model = {**record["model"], "tier": tier, "switches": switches}
        write(on_gpu({**record, "model": model}, "NVIDIA H200"), tmp_path / "h200" / folder)
    page = render.page(tmp_path)
    headings = [line for line in page.splitlines() if line.startswith("#### ")]
    assert headings == [
        "#### published, bf16, tier exact: graphs=off",
        "#### published, bf16, tier exact",
        "#### published, bf16, tier fast: ar_weights=int8, dit_weights=fp8",
        "#### published, bf16, tier fast: ar_weights=int8, dit_weights=fp8, step_cache=2",
    ]
    (target,) = (found for found in targets() if found.tier == "fast" and found.batch == 1)
    records = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.rglob("bench.json")}
    assert [name for name, found in records.items() if target.matches(BenchRecord.of(found))] == ["faster"]
    (exact,) = (found for found in targets() if found.label == "an image, H200")
    assert [name for name, found in records.items() if exact.matches(BenchRecord.of(found))] == ["exact"]


def test_a_composed_image_and_a_single_run_are_said_to_be_that(tmp_path: Path) -> None:
    """In the table, below it and beside the target; what was timed says nothing."""
    record = bench_record()
    parts = "composed: 729 x ar.token (ours) + 30 x dit.step (ours)"
    for line in record["lines"]:
        if line["name"] == "image" and line["batch"] == 1:
            line["note"] = parts if line["who"] == "ours" else "its only run is its first"
    write(record, tmp_path / "imaginary")
    page = render.page(tmp_path)
    ours = row(page, "image", "one image", "1")
    assert ours[3].endswith(" (composed)")
    assert ours[4:6] == ["", ""]  # p90 and n
    assert f"* image, ours: {parts}.\n" in page
    assert "* image, published: its only run is its first.\n" in page
    image = row(page, "an image beside the published code")[-1]
    assert image.endswith(" (composed; its only run is its first)")
    assert "(" not in row(page, "a denoising step beside diffusers")[-1]


def test_a_faster_baseline_is_named() -> None:
    record = bench_record()
    assert slower_than(rows([BenchRecord.of(record)])) == []
    for line in record["lines"]:
        if line["who"] == "diffusers" and line["name"] == "vae.decode":
            line["median"] /= 2
    (sentence,) = slower_than(rows([BenchRecord.of(record)]))
    assert sentence.startswith("vae.decode: diffusers takes 0.")


@pytest.mark.parametrize("key", ["lines", "ceilings", "ops", "ablations", "machine", "versions", "command"])
def test_a_record_without_a_part_gives_a_page(key: str, tmp_path: Path) -> None:
    write({name: part for name, part in bench_record().items() if name != key}, tmp_path / "m")
    assert "##" in render.page(tmp_path)


def test_every_target_can_be_read() -> None:
    for target in targets():
        assert (target.least is None) != (target.most is None)
        assert target.measure in ("seconds", "rate", "utilization", "ratio", "memory")
        assert (target.baseline is not None) == (target.measure in ("ratio", "memory"))


def test_the_committed_page_is_what_the_committed_records_give() -> None:
    assert render.PAGE.read_text(encoding="utf-8") == render.page()
