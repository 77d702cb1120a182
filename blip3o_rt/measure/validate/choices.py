"""Discrete choices (tokens, codes) against the scores of the published model.

Where two scores are nearer to each other than rounding, either choice is right, and the tokens after it
differ too. So a choice is compared with the published scores at its own place: it is wrong where its score
is below the best by more than both scores may be off.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from blip3o_rt.measure.validate.bounds import BF16_RATIO, FP32_BOUND
from blip3o_rt.measure.validate.line import Line, at_most


def choice_line(
    group: str,
    name: str,
    dtype: str,
    chosen: Tensor,
    scores: Tensor,
    published_scores: Tensor | None,
    noun: str,
) -> Line:
    """Choices [N] against published float32 scores [N, C]; found is how many are wrong.

    published_scores: in bfloat16, for a "bf16" line: a score may be off by 1.25 times their largest error.
    Without them it may be off by the bound of float32, of the largest score.
    """
    chosen, scores = chosen.cpu(), scores.float().cpu()
    best, likeliest = scores.max(dim=1)
    if chosen.shape != likeliest.shape or bool(((chosen < 0) | (chosen >= scores.shape[1])).any()):
        detail = f"not one of {scores.shape[1]} {noun}s for each of {len(scores)} places"
        return at_most(group, name, dtype, f"wrong {noun}s", float("nan"), 0.0, why="in range", detail=detail)
    gap = best - scores.gather(1, chosen[:, None])[:, 0]
    rounding, reference_error = FP32_BOUND * float(scores.abs().max()), None
    if published_scores is not None:
        published_scores = published_scores.float().cpu()
        rounding = BF16_RATIO * float((published_scores - scores).abs().max())
        reference_error = float((published_scores.argmax(dim=1) != likeliest).sum())
    wrong = gap > 2 * rounding
    detail = f"{int((chosen == likeliest).sum())} of {len(chosen)} are the published {noun}s"
    if bool(wrong.any()):
        place = int(wrong.int().argmax())
        detail += f"; the first wrong one is {place}: its score is {float(gap[place]):.2e} below the best"
    elif bool((gap > 0).any()):
        detail += f", the others are within rounding of it ({float(gap.max()):.2e} below)"
    why = f"a score may be off by {rounding:.1e}, so ties up to {2 * rounding:.1e} go either way"
    rest: dict[str, Any] = {"why": why, "reference_error": reference_error, "detail": detail}
    return at_most(group, name, dtype, f"wrong {noun}s", float(wrong.sum()), 0.0, **rest)
