"""Progress reaches the callback in every case, and bars are drawn for people alone."""

from __future__ import annotations

import io

import pytest

from blip3o_rt.errors import Cancelled
from blip3o_rt.params import Progress
from blip3o_rt.progress import ProgressReporter


class Terminal(io.StringIO):
    """A standard error that somebody watches."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "show", "drawn"),
    [(Terminal(), True, True), (Terminal(), False, False), (io.StringIO(), True, False)],
)
def test_bars_are_drawn_on_a_terminal_where_asked(
    monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, show: bool, drawn: bool
) -> None:
    monkeypatch.setattr("sys.stderr", stream)
    heard: list[Progress] = []
    with ProgressReporter(heard.append, show).stage("denoise", 2) as update:
        update(1)
        update(2)
    assert ("denoise" in stream.getvalue()) is drawn
    assert heard == [Progress("denoise", 1, 2), Progress("denoise", 2, 2)]


def test_a_callback_that_returns_false_cancels() -> None:
    with (
        pytest.raises(Cancelled, match="at tokens 1 of 3"),
        ProgressReporter(lambda progress: False, False).stage("tokens", 3) as update,
    ):
        update(1)
