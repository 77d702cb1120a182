"""The Triton kernels of the package: usable, or the reason why not and what to do about it."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

OLDEST_RELEASE = (3, 6)
OLDEST_CAPABILITY = (8, 0)  # the first with bfloat16 products
E4M3_CAPABILITY = (8, 9)  # the first with numbers and products of 8-bit floating point
KERNELS = "blip3o_rt.triton_kernels"
MAX_ROW = 16384  # elements of a row that one program holds


@functools.cache
def unavailable() -> str | None:
    """None if Triton kernels can run on this machine's GPUs, else the reason and the remedy."""
    try:
        release = importlib.import_module("triton").__version__
    except ImportError:
        return "triton is not installed; pip install 'triton>=3.6' (Linux)"
    if tuple(int(number) for number in re.findall(r"\d+", release)[:2]) < OLDEST_RELEASE:
        return f"triton {release} is too old; pip install 'triton>=3.6'"
    return gpu_unavailable(OLDEST_CAPABILITY) or _no_compiler()


def e4m3_unavailable() -> str | None:
    """None if Triton kernels can run here and make e4m3 numbers, else the reason and the remedy."""
    return unavailable() or gpu_unavailable(E4M3_CAPABILITY)


def gpu_unavailable(capability: tuple[int, int]) -> str | None:
    """None if there are GPUs and all have a compute capability, else what is wrong and what to do."""
    if not torch.cuda.is_available():
        return "no usable GPU; needs an NVIDIA GPU, its driver and a PyTorch with CUDA"
    for index in range(torch.cuda.device_count()):
        if torch.cuda.get_device_capability(index) < capability:
            return (
                f"{torch.cuda.get_device_name(index)} is older than compute capability "
                f"{'.'.join(map(str, capability))}; hide that GPU with CUDA_VISIBLE_DEVICES"
            )
    return None


def _no_compiler() -> str | None:
    """None if there is the C compiler that Triton builds its launchers with, else what to do about it."""
    chosen = os.environ.get("CC")
    if chosen is not None and not shutil.which(chosen):
        return f"triton needs a C compiler and CC is {chosen!r}, no program; set it to one or unset it"
    if chosen is not None or shutil.which("gcc") or shutil.which("clang"):
        return None
    return "triton needs a C compiler; install gcc or clang, or set CC to one"


def kernel(op_name: str) -> Callable[..., Any]:
    """What launches an op's kernels, on the device of the first tensor whichever is the current one.

    They are compiled at the first launch of every kind of shape.
    """
    _find_kernels()
    launch: Callable[..., Any] = getattr(importlib.import_module(f"{KERNELS}.{op_name}"), op_name)

    @functools.wraps(launch)
    def launch_there(first: Tensor, *arguments: Any) -> None:
        with torch.cuda.device_of(first):
            launch(first, *arguments)

    return launch_there


def _find_kernels() -> None:
    """Import the package of kernels. In a source tree that is not installed it lies beside blip3o_rt."""
    if importlib.util.find_spec(KERNELS) is not None:
        return
    beside = Path(__file__).parents[2] / "triton_kernels" / "__init__.py"
    spec = importlib.util.spec_from_file_location(KERNELS, beside)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[KERNELS] = package = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)


def takes_rows(call: Any, *names: str) -> str | None:
    """None if the rows of these arguments are contiguous, at one distance and not too wide, else why not."""
    for name in names:
        tensor = getattr(call, name)
        if tensor is not None and not _has_rows(tensor):
            return f"takes {name} with contiguous rows of at most {MAX_ROW} elements at one distance"
    return None


def takes_contiguous(call: Any, *names: str) -> str | None:
    """None if each of these arguments that is given is contiguous, else why not."""
    for name in names:
        tensor = getattr(call, name)
        if tensor is not None and not tensor.is_contiguous():
            return f"takes contiguous {name}"
    return None


def _has_rows(x: Tensor) -> bool:
    if x.shape[-1] > MAX_ROW or (x.shape[-1] > 1 and x.stride(-1) != 1):
        return False
    outer = [(size, step) for size, step in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    return all(step == size * inner for (_, step), (size, inner) in pairwise(outer))
