"""The compiled modules of the package: found, or the reason why not and what to do about it."""

from __future__ import annotations

import functools
import importlib
import os
import re
import threading
from types import ModuleType
from typing import Any

import torch

from blip3o_rt.errors import OpError

ISA_VARIABLE = "BLIP3O_CPU_ISA"


REMEDIES = {
    "_cpu": "install a C++17 compiler (g++ or clang++), then run pip install again",
    "_cuda": "install the CUDA toolkit (nvcc), then run pip install again with BLIP3O_CUDA=on",
}


@functools.cache
def _load(name: str) -> tuple[ModuleType | None, str | None]:
    """The module, or None and the reason with the remedy."""
    try:
        return importlib.import_module(f"blip3o_rt.{name}"), None
    except ModuleNotFoundError:
        return None, f"blip3o_rt.{name} is not built; {REMEDIES[name]}"
    except ImportError as error:
        return None, f"blip3o_rt.{name} cannot be loaded ({error}); {REMEDIES[name]}"


@functools.cache
def cpu_module() -> ModuleType | None:
    """blip3o_rt._cpu with its threads and instruction set chosen, or None (cpu_unavailable says why).

    It uses as many threads as torch does (see `cpu`). BLIP3O_CPU_ISA=portable|avx2|avx512 overrides the
    choice of the best instruction set. Raises OpError if this machine lacks the one asked for.
    """
    module, _ = _load("_cpu")
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
    return _load("_cpu")[1] if cpu_module() is None else None


@functools.cache
def cuda_module() -> ModuleType | None:
    """blip3o_rt._cuda, or None (cuda_unavailable says why). It imports without a GPU or a driver."""
    return _load("_cuda")[0]


@functools.cache
def cuda_unavailable() -> str | None:
    """None if kernels of blip3o_rt._cuda can run here, else the reason and the remedy."""
    module = cuda_module()
    if module is None:
        return _load("_cuda")[1]
    info = module.device_info()
    if not info["devices"]:
        return f"no usable GPU ({info['reason']}); needs an NVIDIA GPU and its driver"
    return _without_code(info["devices"], module.architectures)


def _without_code(devices: list[dict[str, Any]], architectures: str) -> str | None:
    """None if a build for `architectures` ("80-real 90-virtual") runs on all devices, else why not."""
    for device in devices:
        major, minor = device["compute_capability"]
        if not any(_runs_on(major, minor, architecture) for architecture in architectures.split()):
            needed = ";".join(sorted({"{}{}".format(*other["compute_capability"]) for other in devices}))
            return (
                f"no code for {device['name']} (compute capability {major}.{minor}) in this build, which is "
                f"for {architectures}; run pip install again with BLIP3O_CUDA_ARCHS='{needed}', or hide that "
                f"GPU with CUDA_VISIBLE_DEVICES"
            )
    return None


def _runs_on(major: int, minor: int, architecture: str) -> bool:
    """Whether code for a CMake architecture (80, 80-real, 80-virtual, 90a-real, native) runs on a GPU.

    Machine code runs on its own major version from its minor version on, PTX on everything from its version
    on, and both only on exactly their version if that ends in a.
    """
    found = re.fullmatch(r"(\d+)(\d)([af]?)(?:-(real|virtual))?", architecture)
    if found is None:
        return True  # native, all, all-major: CMake chose for this machine
    built, here = (int(found[1]), int(found[2])), (major, minor)
    if found[3] == "a":
        return here == built
    only_real = found[4] == "real" or found[3] == "f"
    return here >= built and (not only_real or here[0] == built[0])


def cpu() -> Any:
    """blip3o_rt._cpu, on as many threads as torch uses now. Raises OpError where it is not built.

    Torch keeps a number of threads for each thread that calls it: the number last changed counts.
    """
    module = cpu_module()
    if module is None:
        raise OpError(str(cpu_unavailable()))
    threads = torch.get_num_threads()
    if threads != getattr(_seen, "threads", None):
        module.set_num_threads(threads)
        _seen.threads = threads
    return module


_seen = threading.local()  # threads: torch's number when this thread last asked


def cuda() -> Any:
    """blip3o_rt._cuda. Raises OpError with the remedy where it is not built."""
    module = cuda_module()
    if module is None:
        raise OpError(str(_load("_cuda")[1]))
    return module
