"""Numbers from the host to a device, without waiting for what the device still has to do."""

from __future__ import annotations

import torch
from torch import Tensor


def upload(values: list[float] | list[int] | list[list[int]], buffer: Tensor) -> None:
    """Write numbers into a buffer."""
    host = torch.tensor(values, dtype=buffer.dtype, pin_memory=buffer.is_cuda)
    buffer.copy_(host, non_blocking=True)


def uploaded(values: list[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers as a new tensor [n]."""
    host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)
