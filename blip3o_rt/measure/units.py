"""Numbers as people read them: times, rates, bytes, ratios and shares; what was not measured is empty."""

from __future__ import annotations

TIME_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))


def significant(value: float, digits: int = 3) -> str:
    """A number with so many significant digits and no exponent where a person reads none: 0.0123, 1,230."""
    if value == 0.0:
        return "0"
    magnitude = abs(float(f"{value:.{digits - 1}e}"))
    if magnitude >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    if magnitude < 1e-4:
        return f"{value:.{digits - 1}e}"
    decimals = digits - len(f"{int(magnitude)}") if magnitude >= 1 else _decimals_below_one(magnitude, digits)
    return f"{value:.{decimals}f}"


def _decimals_below_one(magnitude: float, digits: int) -> int:
    return digits - 1 - int(f"{magnitude:e}".partition("e")[2])


def time_text(seconds: float | None) -> str:
    """12.3 ms; empty for None."""
    if seconds is None:
        return ""
    for scale, unit in TIME_UNITS:
        if abs(seconds) >= 0.9995 * scale or unit == "ns":  # 1.00 s, not 1,000 ms
            return f"{significant(seconds / scale)} {unit}"
    return ""


def memory_text(count: float | None) -> str:
    """Bytes as GiB or MiB; empty for None."""
    if count is None:
        return ""
    return f"{significant(count / 2**30)} GiB" if count >= 2**30 else f"{significant(count / 2**20)} MiB"


def ratio_text(ratio: float | None) -> str:
    """1.52x; empty for None."""
    return "" if ratio is None else f"{ratio:.2f}x"


def share_text(share: float | None) -> str:
    """78%; empty for None."""
    return "" if share is None else f"{100 * share:.0f}%"


def number_text(value: float | None) -> str:
    """Three significant digits; empty for None."""
    return "" if value is None else significant(value)
