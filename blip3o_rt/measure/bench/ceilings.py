"""What the machine can do at best, measured in the same run: reading, copying, and matrix products.

A ceiling is the fastest of its samples: whatever disturbs a sample only makes it slower.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from blip3o_rt import ops
from blip3o_rt.measure.bench.timing import quiet, seconds

RUNS = 10
BUFFER_BYTES = {"cpu": 2**29, "cuda": 2**31}  # well beyond any cache
QUICK_BUFFER_BYTES = 2**26
MATMUL_SHAPE = {"cpu": (1024, 2240, 5600), "cuda": (8192, 8192, 8192)}  # the DiT's own; enough for a GPU
QUICK_MATMUL_SHAPE = (256, 512, 512)
ROW = 2048  # width of the rows that are read by a product with one row
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Ceiling:
    """One ceiling: name "read", "copy" or "matmul"; value and samples in the unit, GB/s or GFLOP/s."""

    name: str
    dtype: str | None
    unit: str
    value: float
    samples: list[float]

    @property
    def key(self) -> str:
        """The name that lines refer to: "read", "copy", "matmul bf16"."""
        return f"{self.name} {self.dtype}" if self.dtype else self.name

    @property
    def per_second(self) -> float:
        """Bytes or operations a second."""
        return self.value * 1e9


def measure(device: torch.device, *, quick: bool = False) -> list[Ceiling]:
    """Every ceiling of a device, with all threads that torch uses. quick: too small to mean anything."""
    size = QUICK_BUFFER_BYTES if quick else BUFFER_BYTES[device.type]
    rows, inner, columns = QUICK_MATMUL_SHAPE if quick else MATMUL_SHAPE[device.type]
    with quiet():
        found = _bandwidths(size, device)
        for name, dtype in DTYPES.items():
            left = torch.randn(rows, inner, device=device).to(dtype)
            right = torch.randn(columns, inner, device=device).to(dtype)
            flops = 2 * rows * inner * columns
            rates = [_rate("matmul", call, flops, device, dtype=name) for call in products(left, right)]
            found.append(max(rates, key=lambda ceiling: ceiling.value))
    return found


def _bandwidths(size: int, device: torch.device) -> list[Ceiling]:
    """Reading a buffer of `size` bytes the fastest way there is, and copying it."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    reads = [_rate("read", read, size, device) for read in readers(source)]
    copy = _rate("copy", lambda: target.copy_(source), 2 * size, device)  # read once, written once
    return [max(reads, key=lambda ceiling: ceiling.value), copy]


def readers(source: Tensor) -> list[Callable[[], Any]]:
    """Ways to read the whole buffer; which is the fastest depends on the machine."""
    rows = source.view(torch.bfloat16).view(-1, ROW)
    one, out = rows[:1].clone(), torch.empty(1, len(rows), device=source.device)
    found: list[Callable[[], Any]] = [source.sum, source.amax]
    if source.device.type == "cpu":
        found.append(lambda: ops.row_linear(one, rows, out=out))
    return found


def products(left: Tensor, right: Tensor) -> list[Callable[[], Any]]:
    """Ways to multiply matrices [M, K] and [N, K]; which is the fastest depends on the machine."""
    return [partial(multiply, left, right) for multiply in (F.linear, ops.linear)]


def _rate(
    name: str, call: Callable[[], Any], amount: int, device: torch.device, dtype: str | None = None
) -> Ceiling:
    """The ceiling of a call that moves so many bytes or does so many operations."""
    call()
    samples = [amount / seconds(call, device) / 1e9 for _ in range(RUNS)]
    return Ceiling(name, dtype, "GFLOP/s" if name == "matmul" else "GB/s", max(samples), samples)
