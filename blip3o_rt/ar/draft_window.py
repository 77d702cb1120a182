"""How many rows the images of a batch get in a pass: guesses that are right make tokens, rows cost time.

A row more gives its image a token with the chance that every guess before it was right. That chance is
estimated for each image from what agreed so far, and the time of a pass by its rows from the passes that ran.
Rows go where they give most, and as many are given as make the most tokens a second. What is chosen changes
the speed, never the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from blip3o_rt.params import MAX_DRAFT_WINDOW

PRIOR_RIGHT, PRIOR_GUESSES = 1.5, 2.0  # hopeful, so that the first windows are long enough to learn from
FORGETTING = 0.9  # of the weight of earlier guesses, a pass
COST_OF_A_ROW = 0.1  # of a pass of one row, where nothing was measured: little, as its weights bind it
PASSES_BETWEEN = 4  # before windows are chosen anew
WORTH_A_CHANGE = 1.1  # times more tokens a second, by the estimates: laying out takes about a pass


@dataclass
class Agreement:
    """How often the guesses of one image were right, the newest counting most."""

    right: float = PRIOR_RIGHT
    guesses: float = PRIOR_GUESSES

    def note(self, kept: int, offered: int) -> None:
        """Add a pass that kept so many tokens of at most `offered`."""
        if offered < 2 or kept < 1:
            return
        wrong = kept < offered
        self.right = FORGETTING * self.right + kept - 1
        self.guesses = FORGETTING * self.guesses + kept - 1 + wrong

    def like(self) -> Agreement:
        """What a new image may expect where this is what others found."""
        return Agreement(self.chance * PRIOR_GUESSES, PRIOR_GUESSES)

    @property
    def chance(self) -> float:
        """That a guess is right where those before it were."""
        return min(self.right / self.guesses, 0.99)


class PassTimes:
    """Seconds of a pass by its rows, learned from passes as they run."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}  # by rows, as measured

    def note(self, rows: int, seconds: float) -> None:
        """Add a pass. A quick one counts more: what disturbs a pass only makes it longer."""
        known = self._seconds.setdefault(rows, seconds)
        self._seconds[rows] = known + (0.5 if seconds < known else 0.1) * (min(seconds, 2 * known) - known)

    def estimate(self, rows: int) -> float:
        """Seconds of a pass of so many rows, between and beyond those that were measured.

        An estimate never exceeds the time of a larger pass, nor a smaller pass's time per row. So one pass
        that was disturbed does not put its number of rows out of use.
        """
        bounds = (seconds * max(1.0, rows / known) for known, seconds in self._seconds.items())
        return min(self._expected(rows), *bounds) if self._seconds else self._prior(rows)

    def _expected(self, rows: int) -> float:
        """As measured, between two measured ones in proportion, beyond them by the prior."""
        measured = sorted(self._seconds)
        nearest = min(max(rows, measured[0]), measured[-1])
        seconds = np.interp(nearest, measured, [self._seconds[known] for known in measured])
        return float(seconds) * self._prior(rows) / self._prior(nearest)

    @staticmethod
    def _prior(rows: int) -> float:
        return 1.0 + COST_OF_A_ROW * (rows - 1)


@dataclass(frozen=True)
class Share:
    """What an image can use: the chance of a guess, its most rows, and whether it wants just those."""

    chance: float
    most: int
    fixed: bool = False


def choose(shares: Sequence[Share], times: PassTimes, max_rows: int) -> list[int]:
    """The rows of each image, at least one, at most `max_rows` in all where there are fewer images."""
    sizes = [1] * len(shares)
    gains = [1.0 if share.fixed else share.chance for share in shares]  # of the next row, in tokens
    tokens = float(len(shares))
    best, best_rate = list(sizes), tokens / times.estimate(len(sizes))
    while (rows := sum(sizes)) < max_rows:
        open_ones = [i for i, share in enumerate(shares) if sizes[i] < share.most]
        if not open_ones:
            break
        # Fixed windows grow first and evenly, whatever they give; the rest is shared by gain.
        wanted = [i for i in open_ones if shares[i].fixed]
        image = min(wanted, key=sizes.__getitem__) if wanted else max(open_ones, key=gains.__getitem__)
        tokens += shares[image].chance ** sizes[image]
        sizes[image] += 1
        if not wanted:
            gains[image] *= shares[image].chance
        rate = tokens / times.estimate(rows + 1)
        if wanted or rate > best_rate:
            best, best_rate = list(sizes), rate
    return best


class Drafting(Protocol):
    """An image of a batch; draft_window: its most rows, None where they are chosen."""

    draft_window: int | None
    window: int
    num_generated: int
    agreement: Agreement


class DraftWindows:
    """Chooses the windows of a batch anew every few passes."""

    def __init__(self, max_rows: int, tokens_per_image: int) -> None:
        self.times = PassTimes()
        self._typical = Agreement()  # of the images that were finished
        self._max_rows, self._tokens = max_rows, tokens_per_image
        self._passes = 0

    def begin(self, member: Drafting) -> None:
        """An image joins: expect of it what the last ones showed."""
        member.agreement = self._typical.like()

    def finish(self, member: Drafting) -> None:
        """An image is done: learn from it."""
        self._typical = member.agreement

    def choose(self, members: Sequence[Drafting]) -> list[int]:
        """The windows of members that are laid out now."""
        self._passes = 0
        return choose([self._share(member) for member in members], self.times, self._max_rows)

    def change(self, members: Sequence[Drafting]) -> bool:
        """Whether other windows are worth the laying out, after a pass."""
        self._passes += 1
        if self._passes < PASSES_BETWEEN or all(member.draft_window == 1 for member in members):
            return False
        current = [member.window for member in members]
        return self._rate(members, self.choose(members)) > WORTH_A_CHANGE * self._rate(members, current)

    def _rate(self, members: Sequence[Drafting], windows: list[int]) -> float:
        """Tokens a second to expect; rows past an image's last token give none."""
        tokens = sum(
            sum(member.agreement.chance**row for row in range(min(window, self._left(member))))
            for member, window in zip(members, windows, strict=True)
        )
        return tokens / self.times.estimate(sum(windows))

    def _left(self, member: Drafting) -> int:
        """The most rows of the next pass that can read a token: it draws at least one before."""
        return max(1, self._tokens - member.num_generated)

    def _share(self, member: Drafting) -> Share:
        most = min(member.draft_window or MAX_DRAFT_WINDOW, self._left(member))
        return Share(member.agreement.chance, most, fixed=member.draft_window is not None)
