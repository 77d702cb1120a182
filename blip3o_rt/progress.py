"""One place that tells the caller how far a request is, draws the bars, and hears when to stop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm

from blip3o_rt.errors import Cancelled
from blip3o_rt.params import Progress

ProgressCallback = Callable[[Progress], "bool | None"]


class ProgressReporter:
    """Reports the stages of a request to a callback and, where asked, to progress bars on standard error.

    Bars are for people: none are drawn where standard error is not a terminal (a notebook shows them).

    A callback that returns False ends the request with Cancelled, between two tokens or two steps.
    """

    def __init__(self, callback: ProgressCallback | None, show: bool) -> None:
        self._callback = callback
        self._show = show

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """A stage of `total` units; the block is given a function to call with the units done so far."""
        disable = None if self._show else True  # None: shown on a terminal
        with tqdm(total=total, desc=name, disable=disable, leave=False) as bar:

            def update(done: int) -> None:
                bar.update(done - bar.n)
                if self._callback is not None and self._callback(Progress(name, done, total)) is False:
                    raise Cancelled(f"cancelled by the callback at {name} {done} of {total}")

            yield update
