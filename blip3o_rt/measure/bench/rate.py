"""What the work of a line is counted in, and how fast it is done, in words."""

from __future__ import annotations

from blip3o_rt.measure.units import number_text, time_text

UNITS = {
    "ar.prefill": "token",
    "ar.token": "token",
    "ar.second_pass": "token",
    "dit.step": "step",
    "dit.step.edit": "step",
}
PICTURE = "picture"  # the unit of every other line
UNCOUNTED = ("image.host", "dit.tables", "dit.condition")  # lines whose work per second says nothing


def rate_text(name: str, per: float, median: float | None) -> str:
    """1,353 tokens/s, 0.0213 pictures/s, 16.9 ms/step; empty where that says nothing."""
    if not median or name in UNCOUNTED:
        return ""
    unit = UNITS.get(name, PICTURE)
    return f"{time_text(median / per)}/step" if unit == "step" else f"{number_text(per / median)} {unit}s/s"
