"""The compiled modules of the package: found, or the reason why not and what to do about it."""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType
from typing import Any

import torch

from blip3o_rt.errors import OpError

ISA_VARIABLE = "BLIP3O_CPU_ISA"


@functools.cache
def _load(name: str, remedy: str) -> tuple[ModuleType | None, str | None]:
    """The module, or None and the reason with the remedy."""
    try:
        return importlib.import_module(f"blip3o_rt.{name}"), None
    except ModuleNotFoundError:
        return None, f"blip3o_rt.{name} is not built; {remedy}"
    except ImportError as error:
        return None, f"blip3o_rt.{name} cannot be loaded ({error}); {remedy}"


def _load_cpu() -> tuple[ModuleType | None, str | None]:
    return _load("_cpu", "install a C++17 compiler (g++ or clang++), then run pip install again")


def _load_cuda() -> tuple[ModuleType | None, str | None]:
    return _load("_cuda", "install the CUDA toolkit (nvcc), then run pip install again with BLIP3O_CUDA=on")


@functools.cache
def cpu_module() -> ModuleType | None:
    """blip3o_rt._cpu with its threads and instruction set chosen, or None (cpu_unavailable says why).

    It uses as many threads as torch does. BLIP3O_CPU_ISA=portable|avx2|avx512 overrides the choice of the
    best instruction set. Raises OpError if this machine lacks the one asked for.
    """
    module, _ = _load_cpu()
    if module is not None:
        isa = os.environ.get(ISA_VARIABLE)
        if isa and isa not in module.isas():
            accepted = ", ".join(module.isas())
            raise OpError(f"{ISA_VARIABLE}: this machine has no '{isa}' kernels; accepted: {accepted}")
        if isa:
            module.set_isa(isa)
        module.set_num_threads(torch.get_num_threads())
    return module


def cpu_unavailable() -> str | None:
    """None if blip3o_rt._cpu can be used, else the reason and the remedy."""
    return _load_cpu()[1] if cpu_module() is None else None


@functools.cache
def cuda_module() -> ModuleType | None:
    """blip3o_rt._cuda, or None (cuda_unavailable says why). It imports without a GPU or a driver."""
    return _load_cuda()[0]


@functools.cache
def cuda_unavailable() -> str | None:
    """None if kernels of blip3o_rt._cuda can run here, else the reason and the remedy."""
    module = cuda_module()
    if module is None:
        return _load_cuda()[1]
    info = module.device_info()
    return (
        None if info["devices"] else f"no usable GPU ({info['reason']}); needs an NVIDIA GPU and its driver"
    )


def cpu() -> Any:
    """blip3o_rt._cpu. Raises OpError with the remedy where it is not built."""
    module = cpu_module()
    if module is None:
        raise OpError(str(cpu_unavailable()))
    return module


def cuda() -> Any:
    """blip3o_rt._cuda. Raises OpError with the remedy where it is not built."""
    module = cuda_module()
    if module is None:
        raise OpError(str(_load_cuda()[1]))
    return module
