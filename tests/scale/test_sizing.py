"""The sizing of a service: the arithmetic on known times, and a table of what was measured."""

from __future__ import annotations

import pytest

from blip3o_rt.scale.sizing import Sizing, batches, main, table


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]


def test_a_planner_feeds_as_many_renderers_as_its_batch_pays_for() -> None:
    one = Sizing(batch=16, planning=4.0, rendering=0.5)
    assert (one.planner_rate, one.renderer_rate, one.renderers) == (4.0, 2.0, 2.0)
    assert cells(table([one])) == [["16", "4", "0.5", "4", "2", "2"]]


def test_batches() -> None:
    assert [batches(most) for most in (1, 4, 6)] == [[1], [1, 2, 4], [1, 2, 4, 6]]


def test_it_prints_a_line_for_every_batch(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--device", "cpu", "--dtype", "fp32", "--max-batch", "2", "--steps", "1", "--runs", "1"])
    rows = cells(capsys.readouterr().out)
    assert [row[0] for row in rows] == ["1", "2"]
    assert all(float(cell) > 0 for row in rows for cell in row)
    with pytest.raises(SystemExit):
        main(["--runs", "0"])
    assert "--runs is 0" in capsys.readouterr().err
