"""Files of prompts: every row once and in order, and a corrupt one costs only itself."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from blip3o_rt.errors import ImageError, ParameterError
from blip3o_rt.scale.rows import Row, read_rows

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"
)


def written(path: Path, data: bytes) -> list[Row]:
    path.write_bytes(data)
    return list(read_rows(path))


def test_a_text_file_is_a_prompt_a_line(tmp_path: Path) -> None:
    rows = written(tmp_path / "a.txt", "\ufeffone\r\ntwo, three\n\nfour é".encode() + b"\nbad \xff\nlast")
    assert [row.index for row in rows] == list(range(6))
    assert [row.prompt for row in rows] == ["one", "two, three", "", "four é", "", "last"]
    assert [row.error is not None for row in rows] == [False] * 4 + [True, False]


def test_lines_of_json(tmp_path: Path) -> None:
    lines = [
        b'{"prompt": "one", "id": 7}',
        b'{"prompt": "two", "image": "b.png"}',
        b'{"prompt": "three", "image": ["b.png", "c.png"]}',
        b'{"prompt": 3}',
        b'{"image": "b.png"}',
        b'{"prompt": "cut',
        b"[" * 100_000,
        b"\xff",
        b'{"prompt": "four", "image": 4}',
        b'{"prompt": "last"}',
    ]
    rows = written(tmp_path / "a.jsonl", b"\n".join(lines))
    assert [row.index for row in rows] == list(range(10))
    assert [row.error is None for row in rows] == [True] * 3 + [False] * 6 + [True]
    assert rows[0].extra == {"id": 7}
    assert rows[2].images == ["b.png", "c.png"]
    assert rows[2].references(tmp_path) == [tmp_path / "b.png", tmp_path / "c.png"]


def test_images_of_a_row_are_read_as_all_are(tmp_path: Path) -> None:
    def row(*images: str) -> list[object]:
        return Row(0, "x", list(images)).references(tmp_path)

    assert row("https://example.org/a.png", "~/a.png") == ["https://example.org/a.png", "~/a.png"]
    with pytest.raises(ImageError, match=r"^the row's image is in a format that is not read: HEIC"):
        row("base64:" + base64.b64encode(b"\0\0\0\x18ftypheic" + bytes(32)).decode())
    with pytest.raises(ImageError, match=r"^the row's image is damaged"):
        row("base64:" + base64.b64encode(PNG[:40]).decode())
    with pytest.raises(ImageError, match="is not base64"):
        row("base64:%%%")


def test_a_table_of_commas(tmp_path: Path) -> None:
    data = b'id,prompt,image\n1,"a, b\nc",\n2,d,e.png\n3\n4,f,g,h\n5,\xff,\n6,last,\n'
    rows = written(tmp_path / "a.csv", data)
    assert [row.index for row in rows] == list(range(6))
    assert [row.error is None for row in rows] == [True, True, False, False, False, True]
    assert (rows[0].prompt, rows[1].images, rows[5].extra) == ("a, b\nc", ["e.png"], {"id": "6"})
    with pytest.raises(ParameterError, match="'text'"):
        written(tmp_path / "b.csv", b"text\na\n")


def test_parquet_with_paths_and_with_bytes(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    values = [
        {"prompt": "one", "image": None, "id": 1},
        {"prompt": "two", "image": {"bytes": PNG, "path": "x.png"}, "id": 2},
        {"prompt": None, "image": None, "id": 3},
        {"prompt": "four", "image": {"bytes": None, "path": "y.png"}, "id": 4},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(values), tmp_path / "a.parquet")
    rows = list(read_rows(tmp_path / "a.parquet"))
    assert [row.error is None for row in rows] == [True, True, False, True]
    assert rows[1].references(tmp_path)[0].size == (1, 1)
    assert rows[3].references(tmp_path) == [tmp_path / "y.png"]
    with pytest.raises(ParameterError, match="is not read"):
        written(tmp_path / "b.parquet", b"PAR1 and no more")


def test_a_row_survives_its_line(tmp_path: Path) -> None:
    row = Row(3, "a\nb é \ud800", ["base64:!"], {"when": 1.5})
    line = row.to_json()
    assert "\n" not in line
    assert json.loads(line)["index"] == 3
    assert Row.from_json(line) == row
    with pytest.raises(ImageError):
        row.references(tmp_path)
    with pytest.raises(ParameterError, match="why"):
        Row(4, error="why").references(tmp_path)


def test_what_is_no_file_of_prompts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="missing"):
        read_rows(tmp_path / "nowhere.txt")
    with pytest.raises(ParameterError, match=r"\.jsonl"):
        read_rows(tmp_path / "a.docx")
