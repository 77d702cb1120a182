"""Pages hold what their records hold, need no other file, and say in words what a record lacks."""

from __future__ import annotations

import base64
import builtins
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from blip3o_rt.measure.records import BenchRecord, percentile, rows
from blip3o_rt.measure.reports import bench_html, validate_html
from blip3o_rt.measure.units import memory_text, significant, time_text
from tests.measure.reports.records import bench_record, validate_record

pytest.importorskip("matplotlib")

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "link", "img", "br"}
ADDRESSES = ("src", "href", "action", "data", "poster", "srcset")


class Page(HTMLParser):
    """A page as its text, tables and images; checks that every element is closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = self.script = ""
        self.addresses: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.cells: list[list[str]] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.addresses += [found[name] or "" for name in ADDRESSES if name in found]
        if tag == "img":
            self.images.append(found)
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.script += data
        elif "style" not in self.open:
            self.text += data
            if "td" in self.open or "th" in self.open:
                self.cells[-1][-1] += data.strip()

    def row(self, *beginning: str) -> list[str]:
        """The cells of the one row that begins like this."""
        found = [cells for cells in self.cells if cells[: len(beginning)] == list(beginning)]
        assert len(found) == 1, found
        return found[0]


def bench_page(record: dict[str, Any], folder: Path) -> Page:
    bench_html(record, folder / "bench.html")
    return Page(folder / "bench.html")


def validate_page(record: dict[str, Any], folder: Path) -> Page:
    validate_html(record, folder / "validate.html")
    return Page(folder / "validate.html")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The page of a record that lacks nothing, and no file beside it."""
    folder = tmp_path_factory.mktemp("whole")
    page = bench_page(bench_record(), folder)
    assert [path.name for path in folder.iterdir()] == ["bench.html"]
    return page


def test_a_bench_page_is_one_file_with_its_plots_and_record(whole: Page) -> None:
    page = whole
    assert all(address.startswith("data:") for address in page.addresses)
    assert "url(" not in page.source
    assert "@import" not in page.source
    assert len(page.images) == 5
    for image in page.images:
        assert image["alt"]
        svg = base64.b64decode((image["src"] or "").partition("base64,")[2])
        assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert json.loads(page.script) == bench_record()


def test_ratios_are_the_baselines_time_over_ours(whole: Page) -> None:
    """By hand from the record's medians."""
    record = bench_record()
    median = {(line["name"], line["who"]): line["median"] for line in record["lines"] if line["batch"] == 1}
    page = whole
    token = page.row("ar.token", "one decoded token", "1")
    assert token[3] == f"{1000 * median['ar.token', 'ours']:.0f} ms"
    assert token[6] == "83% MBU (read)"
    ratio = {
        who: median["ar.token", who] / median["ar.token", "ours"] for who in ("transformers", "published")
    }
    assert token[7:10] == [f"{ratio['transformers']:.2f}x", "", f"{ratio['published']:.2f}x"]
    image = page.row("image", "one image", "1")
    assert image[9] == f"{median['image', 'published'] / median['image', 'ours']:.2f}x"
    detail = page.row("image", "4", "ours")
    line = next(line for line in record["lines"] if line["name"] == "image" and line["batch"] == 4)
    assert detail[9] == f"{4 / line['median']:.5f} images/s"
    assert page.row("silu_mul", "cpu")[-1] == "WRONG"
    assert page.row("native row_linear", "ar.token")[-1] == "1.55x"


@pytest.mark.parametrize(
    "key",
    [
        "lines",
        "machine",
        "everything",
        *(
            pytest.param(key, marks=pytest.mark.exhaustive)
            for key in ("ceilings", "ops", "ablations", "model")
        ),
    ],
)
def test_a_bench_record_without_a_part_says_so(key: str, tmp_path: Path) -> None:
    record = (
        {} if key == "everything" else {name: part for name, part in bench_record().items() if name != key}
    )
    page = bench_page(record, tmp_path)
    sentence = {
        "lines": "No stage was timed in this run.",
        "ceilings": "No roofline was measured in this run",
        "ops": "No op was timed alone in this run",
        "ablations": "No switch was taken off in this run",
        "model": "a model that is not named",
        "machine": "a machine that is not named",
    }
    for part, text in sentence.items():
        assert (text.lower() in page.text.lower()) == (key in (part, "everything"))


def test_an_interrupted_run_says_so(tmp_path: Path) -> None:
    for write_page in (bench_page, validate_page):
        assert "not finished" in write_page({"complete": False}, tmp_path).text
        assert "not finished" not in write_page({"complete": True}, tmp_path).text


def test_notes_are_on_the_page(tmp_path: Path) -> None:
    for write_page in (bench_page, validate_page):
        assert "nobody was there" in write_page({"notes": ["nobody was there"]}, tmp_path).text


@pytest.mark.parametrize("part", ["lines", "ops", "ablations", "ceilings"])
def test_entries_may_lack_any_key_or_hold_null(part: str, tmp_path: Path) -> None:
    """One page of entries that each lack another key, and of entries that each have another one null."""
    whole = bench_record()[part][0]
    without = [{name: value for name, value in whole.items() if name != key} for key in whole]
    null = [{**whole, key: None} for key in whole]
    bench_page({part: without}, tmp_path)
    bench_page({part: null}, tmp_path)


def test_a_line_without_its_statistics_gets_them_from_its_samples() -> None:
    record = BenchRecord.of({"lines": [{"name": "ar.token", "samples": [3.0, 1.0, 2.0, 10.0]}]})
    (row,) = rows([record])
    assert row.ours is not None
    assert (row.ours.median, row.ours.fastest, row.ours.count) == (2.5, 1.0, 4)
    assert row.ours.p90 == percentile([3.0, 1.0, 2.0, 10.0], 0.9)


def test_a_record_cannot_break_out_of_its_page(tmp_path: Path) -> None:
    record = {"command": ["</script><script>alert(1)</script>", "<b>&"]}
    page = bench_page(record, tmp_path)
    assert json.loads(page.script) == record
    assert page.source.count("<script") == 1
    assert "<b>&" in page.text


def test_without_matplotlib_the_tables_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    importing = builtins.__import__

    def refuse(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return importing(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", refuse)
    page = bench_page(bench_record(), tmp_path)
    assert page.images == []
    assert page.text.count("pip install 'blip3o_rt[bench]'") == 5
    assert page.row("ar.token", "1", "ours")


def test_a_validate_page_names_what_failed(tmp_path: Path) -> None:
    record = validate_record(tmp_path)
    page = validate_page(record, tmp_path)
    assert "1 of 6 checks on the shapes model FAILED." in page.text
    assert re.search(r"What failed\s+ops: silu_mul, cpu, bf16, 3 x 64 worst error 0\.0250", page.text)
    assert page.row("silu_mul")[-2:] == ["FAILED", "One rounding."]
    hidden = page.row("hidden states")
    assert hidden[3:7] == ["0.00400", "≤ 0.00660", "0.00440", "passed"]
    assert page.row("image")[3:6] == ["44.2", "≥ 38.0", "passed"]
    assert json.loads(page.script) == record


def test_images_are_inside_the_page(tmp_path: Path) -> None:
    record = validate_record(tmp_path)
    page = validate_page(record, tmp_path)
    embedded = [base64.b64decode((image["src"] or "").partition("base64,")[2]) for image in page.images]
    assert embedded == [
        (tmp_path / f"red-{part}.png").read_bytes() for part in ("ours", "reference", "difference")
    ]
    assert "PSNR 44.2 dB, SSIM 0.9987" in page.text
    (tmp_path / "red-ours.png").unlink()
    record["images"][0]["reference"] = None
    page = validate_page(record, tmp_path)
    assert len(page.images) == 1
    assert "red-ours.png is not there." in page.text
    assert "The record names no file." in page.text


@pytest.mark.parametrize("key", ["lines", "images", "model", "machine", "everything"])
def test_a_validate_record_without_a_part_says_so(key: str, tmp_path: Path) -> None:
    whole = validate_record(tmp_path)
    record = {} if key == "everything" else {name: part for name, part in whole.items() if name != key}
    page = validate_page(record, tmp_path)
    assert ("No check was made" in page.text) == (key in ("lines", "everything"))
    assert ("No images were compared" in page.text) == (key in ("images", "everything"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (significant(0.01234), "0.0123"),
        (significant(12.345), "12.3"),
        (significant(1234.5), "1,234"),
        (significant(3.2e-8), "3.20e-08"),
        (significant(-0.5), "-0.500"),
        (significant(0.0), "0"),
        (time_text(0.0123), "12.3 ms"),
        (time_text(3.4e-10), "0.340 ns"),
        (time_text(None), ""),
        (memory_text(3 * 2**29), "1.50 GiB"),
        (memory_text(2**20), "1.00 MiB"),
    ],
)
def test_numbers_are_short_and_have_units(text: str, expected: str) -> None:
    assert text == expected


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize("write", [bench_html, validate_html])
def test_a_browser_opens_it_without_a_word(
    write: Callable[[dict[str, Any], Path], None], tmp_path: Path
) -> None:
    record = bench_record() if write is bench_html else validate_record(tmp_path)
    path = tmp_path / "page.html"
    write(record, path)
    assert console(path) == []


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_a_browser_does_speak_of_errors(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    validate_html({}, path)
    path.write_text(path.read_text().replace("</body>", "<script>missing()</script></body>"))
    assert len(console(path)) == 1


def console(page: Path) -> list[str]:
    """What headless Chromium writes to its console on opening a page."""
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--user-data-dir={page.parent / 'profile'}", "--virtual-time-budget=3000", "--dump-dom"]
    result = subprocess.run(
        [*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    assert "</html>" in result.stdout
    return [line for line in result.stderr.splitlines() if "CONSOLE" in line]
