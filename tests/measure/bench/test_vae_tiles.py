"""The table of tiles measures each number of them in a process of its own, against the first."""

from __future__ import annotations

import pytest
import torch

from blip3o_rt.measure.bench import vae_tiles


def test_the_table_has_a_line_for_each_number_of_tiles() -> None:
    lines = vae_tiles.table("tiny", ["decode"], "fp32", [1, 2]).splitlines()[2:]
    assert [line.split()[:2] for line in lines] == [["decode", "1"], ["decode", "2"]]
    assert lines[0].endswith("same bits")


def test_a_difference_is_told() -> None:
    whole = torch.ones(4)
    assert vae_tiles.difference(whole.clone(), whole) == "same bits"
    assert vae_tiles.difference(whole + torch.tensor([0.5, 0, 0, 0]), whole) == "5.0e-01, L2 2.5e-01"


@pytest.mark.parametrize(("option", "value"), [("--ways", "look"), ("--tiles", "1,x"), ("--tiles", "17")])
def test_other_settings_are_refused(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        vae_tiles.main([option, value])
    assert "accepted are" in capsys.readouterr().err
