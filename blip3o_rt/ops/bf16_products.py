"""Whether the CPU kernels' products of bfloat16 are the fastest here, or those of oneDNN that torch calls."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

from blip3o_rt.machine import processor
from blip3o_rt.ops import native

MEASURE_VARIABLE = "BLIP3O_MEASURE"
ROWS, WIDTH = 32, 1024  # of the product that is timed: 67 MFLOP, under a millisecond on most processors
SECONDS = 0.04  # after which no product is begun
MOST_RUNS = 8
MARGIN = 1.2  # times faster that oneDNN must be, so that noise changes neither the choice nor the bits


def missing() -> str | None:
    """None if the CPU kernels in use multiply bfloat16, else why not."""
    reason = native.cpu_unavailable()
    if reason is None and not native.cpu().has_bf16_products():
        reason = f"no AVX512_BF16 in the kernels in use ({native.cpu().isa()}); torch is as fast"
    return reason


def slower() -> str | None:
    """None if they multiply bfloat16, and no slower than torch; else why not."""
    return missing() or _onednn_faster()


def measured() -> dict[str, str]:
    """What was timed to choose between implementations, by what it chose; empty where nothing had to be."""
    return dict(_measured)


_measured: dict[str, str] = {}


@functools.cache
def _onednn_faster() -> str | None:
    """Why torch's product comes before ours, or None.

    AMX has several times the rate of AVX512_BF16. On AMD's processors ours keeps the multipliers busy. Of
    others nothing is known, so both are timed, unless BLIP3O_MEASURE=off.
    """
    found = processor()
    if not torch.backends.mkldnn.is_available():
        return None
    if "amx_bf16" in found.isa and torch.cpu._init_amx():
        return "oneDNN multiplies bfloat16 by AMX"
    if "AMD" in found.model or os.environ.get(MEASURE_VARIABLE, "").lower() == "off":
        return None
    ours, theirs = _times()
    _measured["linear bf16"] = f"cpu {1e3 * ours:.2f} ms, torch {1e3 * theirs:.2f} ms"
    return f"measured: {_measured['linear bf16']}" if ours > MARGIN * theirs else None


def _times() -> tuple[float, float]:
    """Seconds of the fastest of a few products of ours and of torch's, taken in turn."""
    x = torch.ones(ROWS, WIDTH, dtype=torch.bfloat16)
    weight, out = x.new_ones(WIDTH, WIDTH), x.new_empty(ROWS, WIDTH)
    calls: tuple[Callable[[], object], ...] = (
        lambda: native.cpu().linear(x, weight, out=out),
        lambda: F.linear(x, weight),
    )
    begin = time.perf_counter()
    best = [float("inf")] * len(calls)
    for _ in range(MOST_RUNS):
        for index, call in enumerate(calls):
            start = time.perf_counter()
            if best[index] < float("inf") and start - begin > SECONDS:
                return best[0], best[1]
            call()
            best[index] = min(best[index], time.perf_counter() - start)
    return best[0], best[1]
