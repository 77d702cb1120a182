"""The most memory held while a piece of work runs."""

from __future__ import annotations

import re
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # proc(5): sets the high-water mark to what is resident now


class PeakMemory:
    """Bytes at the worst moment between `begin` and `read`.

    On a GPU what PyTorch had allocated; on the CPU what the whole process held resident, mapped weights and
    everything loaded for other lines included. `read` gives None where the system does not tell.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known = device.type == "cuda"

    def begin(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        try:
            CLEAR.write_text(RESET_PEAK)
            self._known = True
        except OSError:  # not Linux, or a sandbox that does not allow it
            self._known = False

    def read(self) -> int | None:
        if not self._known:
            return None
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        found = re.search(r"^VmHWM:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
        return int(found[1]) * 1024 if found else None
