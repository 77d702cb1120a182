"""The time a run may take, shared out among the lines that are still to come."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable

from blip3o_rt.measure.bench.lines import WEIGHTS


class Budget:
    """Seconds for all lines together; what one line leaves over is shared by those after it."""

    def __init__(
        self, seconds: float, lines: Iterable[str], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._clock = clock
        self._end = clock() + seconds
        self._pending = Counter(lines)

    @property
    def left(self) -> float:
        """Seconds until the budget is spent, never less than none."""
        return max(0.0, self._end - self._clock())

    def take(self, line: str) -> float:
        """The seconds that the next line of this name may take, in proportion to its weight."""
        total = sum(WEIGHTS[name] * count for name, count in self._pending.items())
        share = WEIGHTS[line] / total if total else 1.0
        self.drop(line)
        return self.left * min(1.0, share)

    def drop(self, line: str) -> None:
        """A line of this name takes no time."""
        self._pending[line] = max(0, self._pending[line] - 1)
