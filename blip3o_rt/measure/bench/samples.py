"""What is said of samples: their median, a percentile, and the summary that records hold."""

from __future__ import annotations

import math
from collections.abc import Sequence


def median(samples: Sequence[float]) -> float:
    """The middle sample, or the mean of the middle two."""
    ordered = sorted(samples)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def percentile(samples: Sequence[float], fraction: float) -> float:
    """The sample that the fraction of all stays below, linear between two."""
    ordered = sorted(samples)
    place = fraction * (len(ordered) - 1)
    low, high = math.floor(place), math.ceil(place)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def summary(samples: Sequence[float]) -> dict[str, float | int | None]:
    """median, p90, min and n of samples; None for each of the first three where there are none."""
    if not samples:
        return {"median": None, "p90": None, "min": None, "n": 0}
    return {
        "median": median(samples),
        "p90": percentile(samples, 0.9),
        "min": min(samples),
        "n": len(samples),
    }
