"""What a model is held in and computed in, by name: fp32, bf16, or mixed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from blip3o_rt.errors import DeviceError, shown
from blip3o_rt.machine import processor

BF16_INSTRUCTIONS = {"avx512_bf16", "amx_bf16", "arm_bf16"}


@dataclass(frozen=True)
class Precision:
    """Dtypes of a model.

    Attributes:
        weights: Of the weight matrices.
        arithmetic: Of activations and of all other weights.
    """

    name: str
    weights: torch.dtype
    arithmetic: torch.dtype


FP32 = Precision("fp32", torch.float32, torch.float32)
BF16 = Precision("bf16", torch.bfloat16, torch.bfloat16)
MIXED = Precision("mixed", torch.bfloat16, torch.float32)
NAMES = ("auto", "fp32", "bf16", "mixed")
IN_WORDS = {MIXED.name: "mixed (bf16 weights, float32 arithmetic)"}  # others say it by their name


def precision_of(dtype: torch.dtype | Precision) -> Precision:
    """The precision of weights and arithmetic in one dtype; a precision is itself."""
    return dtype if isinstance(dtype, Precision) else {torch.float32: FP32, torch.bfloat16: BF16}[dtype]


def resolve_precision(name: str, device: torch.device, stored: torch.dtype = torch.bfloat16) -> Precision:
    """The precision that a name stands for.

    "auto" is bf16 where the device has instructions for it: a GPU of compute capability 8.0, a CPU with
    AVX512-BF16, AMX or Arm's BF16. On another CPU the arithmetic is float32 and weights stay as stored.

    Args:
        name: "auto", "fp32", "bf16", or "mixed" (on the CPU: bfloat16 weights, float32 arithmetic).
        device: Where the model runs.
        stored: The dtype of the checkpoint's weights.

    Raises:
        DeviceError: Another name, or what the device does not compute in.
    """
    if not isinstance(name, str) or name not in NAMES:
        raise DeviceError(f"dtype is {shown(name)}: accepted are auto, fp32, bf16 and mixed")
    if name == "fp32":
        return FP32
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
        if name == "mixed":
            raise DeviceError("dtype is 'mixed', which only the CPU computes in: choose auto, fp32 or bf16")
        if name == "bf16" and not native:
            raise DeviceError(f"dtype is 'bf16': {device} is older than compute capability 8.0, choose fp32")
        return BF16 if native else FP32
    if name == "auto":
        native = not BF16_INSTRUCTIONS.isdisjoint(processor().isa)
        return BF16 if native else MIXED if stored == torch.bfloat16 else FP32
    return BF16 if name == "bf16" else MIXED
