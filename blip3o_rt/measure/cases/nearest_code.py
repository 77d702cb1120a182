"""Every remainder of the tiles, several panels of codes, and codes that occur twice."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from blip3o_rt.measure.validate.case import Case, random
from blip3o_rt.measure.validate.finding import WRONG_NUMBERS, Finding
from blip3o_rt.ops.registry import Op


def codebook(count: int, width: int) -> Tensor:
    return F.normalize(random(2, count, width), dim=1)


def cases() -> Iterator[Case]:
    for rows, codes, width in (
        *((rows, 21, 19) for rows in (1, 2, 3, 4, 5, 9)),
        *((3, codes, 16) for codes in (1, 2, 3, 4, 5, 400)),
        *((3, 21, width) for width in (1, 2, 15, 17, 33)),
        (70, 130, 1536),
        (0, 5, 8),
    ):
        label = f"{rows} rows, {codes} codes of {width}"
        yield Case(label, (random(1, rows, width), codebook(codes, width)))
    twice = codebook(60, 24).repeat(3, 1)
    yield Case("codes that occur three times", (random(1, 40, 24), twice))
    yield Case(
        "long and short features", (random(1, 4, 24) * torch.tensor([[1e-12], [1e12], [0.0], [1]]), twice)
    )


def check(op: Op[Any, Any], case: Case, results: list[Tensor], exact: list[Tensor]) -> list[Finding]:
    """The chosen code's score is the largest up to the tolerance; of equal codes it is the first."""
    features, codes = (a.double() for a in case.arguments)
    chosen, expected = results[0], exact[0]
    if chosen.shape != expected.shape or bool(((chosen < 0) | (chosen >= len(codes))).any()):
        return [Finding(WRONG_NUMBERS, float("nan"), 0.0, detail="not one code of the codebook per row")]
    score, best = ((features * codes[index]).sum(dim=1) for index in (chosen, expected))
    shortfall = (best - score) / features.norm(dim=1).clamp(min=torch.finfo(torch.float64).tiny)
    first_equal = (codes[chosen][:, None] == codes[None]).all(dim=-1).int().argmax(dim=1)
    return [
        Finding("score shortfall", max([0.0, *shortfall.tolist()]), op.tolerance[torch.float32]),
        Finding("later of equal codes", float((chosen != first_equal).sum()), 0.0),
    ]
