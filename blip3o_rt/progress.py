"""One place that tells the caller how far a request is, draws the bars, and hears when to stop."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from blip3o_rt.errors import Cancelled
from blip3o_rt.params import Progress

ProgressCallback = Callable[[Progress], "bool | None"]


class ProgressReporter:
    """Reports the stages of a request to a callback and, where asked, to progress bars on standard error.

    Bars are for people: none are drawn where standard error is neither a terminal nor a notebook's.

    A callback that returns False ends the request with Cancelled, between two tokens or two steps.
    """

    def __init__(self, callback: ProgressCallback | None, show: bool) -> None:
        self._callback = callback
        self._show = show

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """A stage of `total` units; the block is given a function to call with the units done so far."""
        bar = _bar(name, total) if self._show else None

        def update(done: int) -> None:
            if bar is not None:
                bar.update(done - bar.n)
            if self._callback is not None and self._callback(Progress(name, done, total)) is False:
                raise Cancelled(f"cancelled by the callback at {name} {done} of {total}")

        try:
            yield update
        finally:
            if bar is not None:
                bar.close()


def _bar(name: str, total: int) -> Any:
    """A progress bar: a widget or text in a notebook, text on a terminal, None elsewhere."""
    if "ipykernel.zmqshell" in sys.modules:
        if importlib.util.find_spec("ipywidgets") is not None:
            from tqdm.notebook import tqdm as widget

            return widget(total=total, desc=name, leave=False)
        return tqdm(total=total, desc=name, leave=False)
    return tqdm(total=total, desc=name, leave=False) if sys.stderr.isatty() else None
