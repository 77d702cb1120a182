"""What the machine does at best, measured in the same run: reading, copying, and matrix products.

A roofline is the fastest of its samples: whatever disturbs a sample only makes it slower.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from blip3o_rt import ops
from blip3o_rt.checkpoint.parts import DTYPES
from blip3o_rt.measure.bench.timing import Candidate, device_clock, quiet, sample
from blip3o_rt.measure.records import Roofline

RUNS = 10
BUFFER_BYTES = {"cpu": 2**29, "cuda": 2**31}  # well beyond any cache
QUICK_BUFFER_BYTES = 2**26
MATMUL_SHAPE = {"cpu": (1024, 2240, 5600), "cuda": (8192, 8192, 8192)}  # the DiT's own; enough for a GPU
QUICK_MATMUL_SHAPE = (256, 512, 512)
ROW = 2048  # width of the rows that are read by a product with one row


def measure(device: torch.device, *, quick: bool = False) -> list[Roofline]:
    """Every roofline of a device, with all threads that torch uses. quick: too small to mean anything."""
    size = QUICK_BUFFER_BYTES if quick else BUFFER_BYTES[device.type]
    rows, inner, columns = QUICK_MATMUL_SHAPE if quick else MATMUL_SHAPE[device.type]
    with quiet():
        source = torch.ones(size // 4, device=device)
        target = torch.empty_like(source)
        found = [
            _best("read", None, readers(source), size, device),
            _best("copy", None, [lambda: target.copy_(source)], 2 * size, device),  # read once, written once
        ]
        for name, dtype in sorted(DTYPES.items(), reverse=True):  # fp32, bf16
            left = torch.randn(rows, inner, device=device).to(dtype)
            right = torch.randn(columns, inner, device=device).to(dtype)
            found.append(_best("matmul", name, products(left, right), 2 * rows * inner * columns, device))
    return found


def readers(source: Tensor) -> list[Callable[[], Any]]:
    """Calls that read the whole buffer; which is the fastest depends on the machine."""
    rows = source.view(torch.bfloat16).view(-1, ROW)
    one, out = rows[:1].clone(), torch.empty(1, len(rows), device=source.device)
    found: list[Callable[[], Any]] = [source.sum, source.amax]
    if source.device.type == "cpu":
        found.append(lambda: ops.row_linear(one, rows, out=out))
    return found


def products(left: Tensor, right: Tensor) -> list[Callable[[], Any]]:
    """Calls that multiply matrices [M, K] and [N, K]; which is the fastest depends on the machine."""
    return [partial(multiply, left, right) for multiply in (F.linear, ops.linear)]


def _best(
    name: str, dtype: str | None, calls: list[Callable[[], Any]], amount: int, device: torch.device
) -> Roofline:
    """The roofline of the fastest call; each moves so many bytes or does so many operations."""
    clock = device_clock(device)
    rates = []
    for call in calls:
        candidate = Candidate("", call)
        call()
        rates.append([amount / sample(candidate, clock)[0] / 1e9 for _ in range(RUNS)])
    fastest = max(rates, key=max)
    unit = "GFLOP/s" if name == "matmul" else "GB/s"
    return Roofline(name=name, dtype=dtype, unit=unit, value=max(fastest), samples=tuple(fastest))
