"""The lines of a validation as a terminal shows them, one by one as they come."""

from __future__ import annotations

from collections.abc import Sequence

from blip3o_rt.measure.validate.line import Line

HEADER = f"{'':4} {'group':11} {'what':38} {'on':14} {'dtype':5} {'found':>9}    {'bound':9} measure; why"


def row(line: Line, above: Line | None = None) -> str:
    """One line; one that failed is followed by what is known of it.

    Measure and reason are left out where the line above has the same.
    """
    relation = ">=" if line.measure.startswith(("PSNR", "SSIM")) else "<="
    name = f"{line.name} [{line.shape}]" if line.shape else line.name
    yardstick = "" if line.reference_error is None else f" ({figure(line.reference_error)})"
    same = above is not None and (line.measure, line.why) == (above.measure, above.why)
    reason = yardstick.strip() if same else f"{line.measure}; {line.why}{yardstick}"
    text = (
        f"{'ok' if line.passed else 'FAIL':4} {line.group:11} {name:38} {line.implementation or '':14} "
        f"{line.dtype:5} {figure(line.found):>9} {relation} {figure(line.bound):9} "
        f"{reason}"
    ).rstrip()
    return text if line.passed or line.detail in (None, line.shape) else f"{text}\n     {line.detail}"


def figure(value: float | None) -> str:
    """A figure in at most nine characters; "none" where there is none."""
    if value is None or value != value:
        return "none"
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.1e}" if abs(value) < 1e-2 or abs(value) >= 1e5 else f"{value:.4g}"


def summary(lines: Sequence[Line]) -> str:
    """How many lines passed, and those that failed once more, but for the single cases of an op."""
    failed = [line for line in lines if not line.passed]
    again = ["", "failed:", *(row(line) for line in failed if line.shape is None)] if failed else []
    verdict = f"{len(failed)} FAILED" if failed else "all passed" if lines else "NOTHING was compared"
    return "\n".join([*again, "", f"{len(lines)} lines, {verdict}"])
