"""One line of a validation: what was measured, what was found, the bound and why, and whether it passed."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

GROUPS = ("ops", "ar", "dit", "vae", "tatok", "pipeline", "determinism", "golden")


@dataclass(frozen=True)
class Line:
    """One comparison. Make one with `at_most` or `at_least`, which decide whether it passed.

    group: one of GROUPS. name: the op, or what of the stage. shape: the one case of an op that failed, else
    None. found is None where there is no figure (a kernel raised). reference_error: the error of transformers
    and diffusers in bfloat16 against themselves in float32, where that is the yardstick of the bound.
    """

    group: str
    name: str
    dtype: str
    measure: str
    found: float | None
    bound: float
    passed: bool
    why: str
    implementation: str | None = None
    shape: str | None = None
    reference_error: float | None = None
    detail: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dictionary; figures that are not finite are None."""
        return {name: _finite(value) for name, value in asdict(self).items()}


def at_most(
    group: str, name: str, dtype: str, measure: str, found: float, bound: float, *, why: str, **rest: Any
) -> Line:
    """A line of an error: it passes where found <= bound, and not where found is no number.

    rest: any of implementation, shape, reference_error and detail.
    """
    return Line(group, name, dtype, measure, found, bound, bool(found <= bound), why, **rest)


def at_least(
    group: str, name: str, dtype: str, measure: str, found: float, bound: float, *, why: str, **rest: Any
) -> Line:
    """A line of a likeness (PSNR, SSIM): it passes where found >= bound; otherwise as `at_most`."""
    return Line(group, name, dtype, measure, found, bound, bool(found >= bound), why, **rest)


def severity(found: float, bound: float) -> float:
    """How bad an error is next to others: in bounds, and worst where it is no finite number."""
    in_bounds = found / bound if bound else found * 1e30
    return in_bounds if math.isfinite(in_bounds) else math.inf


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
