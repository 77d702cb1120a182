"""The flow-matching schedule: which noise levels the denoising loop visits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from blip3o_rt.config import SchedulerConfig
from blip3o_rt.errors import ParameterError


@dataclass(frozen=True)
class Schedule:
    """Noise levels from pure noise to none. sigmas fp32 [steps + 1], the last 0; timesteps fp32 [steps]."""

    sigmas: Tensor
    timesteps: Tensor

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    @property
    def delta_sigmas(self) -> Tensor:
        """fp32 [steps]: what each Euler step advances by (negative)."""
        return self.sigmas[1:] - self.sigmas[:-1]


def flow_schedule(config: SchedulerConfig, steps: int) -> Schedule:
    """Sigmas evenly spaced from 1 to 1 / steps, shifted, then 0; timesteps in the units of training.

    The shift is that of flow matching at higher resolutions, s -> shift s / (1 + (shift - 1) s) (arXiv
    2403.03206). Raises ParameterError for steps < 1.
    """
    if steps < 1:
        raise ParameterError(f"steps must be at least 1, got {steps}")
    even = np.linspace(1.0, 1.0 / steps, steps).astype(np.float32)
    shifted = torch.from_numpy(config.shift * even / (1 + (config.shift - 1) * even))
    sigmas = torch.cat([shifted, shifted.new_zeros(1)])
    return Schedule(sigmas, shifted * config.num_train_timesteps)
