"""What this machine has: processor, memory, GPUs, compilers and packages; and checks that depend on it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import psutil
import torch

from blip3o_rt.errors import DeviceError, InsufficientMemoryError, shown

X86_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_bf16", "amx_int8")
# A flag of /proc/cpuinfo -> its name for people.
ISA_FLAGS = {flag: flag for flag in X86_FLAGS} | {"asimd": "neon", "neon": "neon", "bf16": "arm_bf16"}

PACKAGES = ("torch", "transformers", "safetensors", "numpy", "pillow", "tqdm", "psutil", "tabulate", "triton")

FULL_PRECISION = ("fp32_precision", "ieee", "none")  # a setting of torch, and its values that are exact
CGROUP_NO_LIMIT = 2**60  # cgroup v1 writes a number near 2^63 where there is no limit


@dataclass(frozen=True)
class Processor:
    """The CPU: physical and logical cores, cores this process may use, and vector extensions."""

    model: str
    architecture: str
    physical_cores: int
    logical_cores: int
    usable_cores: int
    isa: tuple[str, ...]


@dataclass(frozen=True)
class Memory:
    """Bytes of memory this process may use, and how many of them are free; limit says who sets the total."""

    total: int
    available: int
    limit: str  # "machine" or "cgroup"


@dataclass(frozen=True)
class Gpu:
    """One CUDA device as the driver names it; memory in bytes."""

    name: str
    compute_capability: str
    total_memory: int
    free_memory: int


@dataclass(frozen=True)
class Machine:
    """Everything doctor prints about the machine; a tool or package that is not there is None."""

    system: str
    python: str
    processor: Processor
    memory: Memory
    gpus: tuple[Gpu, ...]
    gpu_status: str  # why there is no GPU, or "found"
    compiler: str | None
    nvcc: str | None
    packages: dict[str, str | None]


def describe() -> Machine:
    """Look at this machine; nothing is written and nothing is started but the compilers' --version."""
    status = cuda_status()
    return Machine(
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        processor=processor(),
        memory=memory(),
        gpus=gpus() if status is None else (),
        gpu_status=status or "found",
        compiler=compiler_version(),
        nvcc=nvcc_version(),
        packages={name: package_version(name) for name in PACKAGES},
    )


def processor() -> Processor:
    """The CPU of this machine; /proc/cpuinfo where there is one."""
    fields = _cpuinfo()
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    logical = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else logical
    return Processor(
        model=fields.get("model name") or platform.processor() or "unknown",
        architecture=platform.machine(),
        physical_cores=psutil.cpu_count(logical=False) or logical,
        logical_cores=logical,
        usable_cores=usable,
        isa=tuple(dict.fromkeys(name for flag, name in ISA_FLAGS.items() if flag in flags)),
    )


def _cpuinfo() -> dict[str, str]:
    """The first processor's fields; empty where the file does not exist."""
    path = Path("/proc/cpuinfo")
    first = path.read_text(errors="replace").split("\n\n")[0] if path.exists() else ""
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def memory(root: Path = Path("/")) -> Memory:
    """Memory this process may use: the machine's, or less where a cgroup (v1 or v2) above it sets a limit."""
    machine = psutil.virtual_memory()
    total, available, limit = int(machine.total), int(machine.available), "machine"
    for group_total, group_available in _cgroup_limits(root):
        if group_total < total:
            total, limit = group_total, "cgroup"
        available = min(available, group_available)
    return Memory(total, max(0, min(available, total)), limit)


def _cgroup_limits(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, free below it) in bytes of every cgroup this process is in that has a memory limit."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        hierarchy, controllers, path = line.split(":", 2)
        if hierarchy == "0" and not controllers:
            mount, files = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup/memory"
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = mount / path.lstrip("/")
        for group in [folder, *folder.parents]:
            yield from _cgroup_limit(group, *files)
            if group == mount:
                break


def _cgroup_limit(group: Path, limit: str, usage: str, reclaimable: str) -> list[tuple[int, int]]:
    """One cgroup's (limit, free below it), none without a limit; droppable file pages count as free."""
    try:
        most = int((group / limit).read_text())  # "max" is no number: no limit
        used = int((group / usage).read_text())
        stat = (group / "memory.stat").read_text()
    except (OSError, ValueError):
        return []
    if most >= CGROUP_NO_LIMIT:
        return []
    cached = re.search(rf"^{reclaimable} (\d+)$", stat, re.MULTILINE)
    return [(most, max(0, most - used + (int(cached[1]) if cached else 0)))]


def require_memory(needed: int, what: str, device: torch.device, remedy: str) -> None:
    """Raise InsufficientMemoryError where fewer than `needed` bytes are free, saying both figures.

    what: the work that needs them, as the subject of a sentence. device: whose memory is asked for. remedy:
    what the reader can do about it.
    """
    if device.type == "cuda":
        free, where = torch.cuda.mem_get_info(device)[0], str(device)
    else:
        free, where = memory().available, "this machine"
    if needed > free:
        need, left = format_bytes(needed), format_bytes(free)
        if need == left:
            need, left = told_apart(needed, free)
        raise InsufficientMemoryError(f"{what} needs {need} of memory, {where} has {left} free: {remedy}")


def format_bytes(count: int) -> str:
    """Bytes as GiB, or MiB below one GiB."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def told_apart(one: int, other: int) -> tuple[str, str]:
    """Two unlike numbers of bytes in GiB, with as many digits as tell them apart."""
    texts = ((f"{one / 2**30:.{digits}f} GiB", f"{other / 2**30:.{digits}f} GiB") for digits in range(1, 16))
    return next(found for found in texts if found[0] != found[1])


def cuda_status() -> str | None:
    """None where PyTorch can use a GPU; otherwise why not and what to do, in one line."""
    if torch.version.cuda is None:
        return (
            f"PyTorch {torch.__version__} is built without CUDA: install a CUDA build of it "
            "(https://pytorch.org/get-started/locally)"
        )
    if torch.cuda.is_available():
        return None
    return (
        f"PyTorch finds no CUDA GPU: install an NVIDIA driver for CUDA {torch.version.cuda} (nvidia-smi must "
        "list the GPU) and see that CUDA_VISIBLE_DEVICES does not hide it"
    )


def gpus() -> tuple[Gpu, ...]:
    """The CUDA devices PyTorch can use."""
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        capability = f"{properties.major}.{properties.minor}"
        found.append(Gpu(properties.name, capability, total_memory=int(total), free_memory=int(free)))
    return tuple(found)


def resolve_device(name: str | torch.device) -> torch.device:
    """The device a name stands for: "auto" (a GPU where there is one), "cpu", "cuda" or "cuda:N".

    Raises DeviceError on another name, on a GPU where there is none (saying how to get it), and on an N that
    does not exist.
    """
    text = str(name) if isinstance(name, str | torch.device) else ""
    match = re.fullmatch(r"auto|cpu|cuda(?::(\d{1,9}))?", text)
    if match is None:
        raise DeviceError(f"device is {shown(name)}: accepted are auto, cpu, cuda and cuda:N")
    status = None if text == "cpu" else cuda_status()
    if text == "cpu" or (text == "auto" and status is not None):
        return torch.device("cpu")
    if status is not None:
        raise DeviceError(f"device is {text!r} but there is no GPU to use: {status}; or choose device cpu")
    index, count = int(match[1] or 0), torch.cuda.device_count()
    if index >= count:
        raise DeviceError(f"device is {text!r}: this machine has GPUs cuda:0 to cuda:{count - 1}")
    return torch.device("cuda", index)


@dataclass(frozen=True)
class _Setting:
    """A setting of torch for the whole process, and the values that exact arithmetic accepts."""

    get: Callable[[], Any]
    put: Callable[[Any], None]
    accepted: tuple[Any, ...]

    @classmethod
    def attribute(cls, owner: Any, name: str, *accepted: Any) -> _Setting:
        return cls(partial(getattr, owner, name), partial(setattr, owner, name), accepted)


class _Held:
    """Settings kept at accepted values while any thread needs them: the last to leave puts back what was."""

    def __init__(self, settings: Callable[[], list[_Setting]]) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._users = 0
        self._before: list[tuple[_Setting, Any]] = []

    @contextmanager
    def hold(self) -> Iterator[None]:
        with self._lock:
            self._users += 1
            if self._users == 1:
                found = ((setting, setting.get()) for setting in self._settings())
                self._before = [(setting, value) for setting, value in found if value not in setting.accepted]
                for setting, _ in self._before:
                    setting.put(setting.accepted[0])
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    for setting, value in self._before:
                        setting.put(value)


def _cpu_settings() -> list[_Setting]:
    backend: Any = torch.backends.mkldnn
    return [
        _Setting.attribute(backend.matmul, *FULL_PRECISION),
        _Setting.attribute(backend.conv, *FULL_PRECISION),
        _Setting.attribute(backend, "enabled", True),
        _Setting.attribute(backend, "deterministic", False),
        *_attention_kernels(),
    ]


def _cuda_settings() -> list[_Setting]:
    matmul, cudnn = torch.backends.cuda.matmul, cast(Any, torch.backends.cudnn)
    return [
        _Setting.attribute(matmul, *FULL_PRECISION),
        _Setting.attribute(cudnn.conv, *FULL_PRECISION),
        _Setting.attribute(cudnn, "enabled", True),
        *_attention_kernels(),
        _Setting.attribute(matmul, "allow_bf16_reduced_precision_reduction", False),
        # Refuses products of cuBLAS without a variable of its own; the sums of ours have one order anyway.
        _Setting(torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode, (0,)),
    ]


def _attention_kernels() -> list[_Setting]:
    """Which kernels attention may use, on either device."""
    cuda = torch.backends.cuda
    return [
        _Setting(cuda.flash_sdp_enabled, cuda.enable_flash_sdp, (True,)),
        _Setting(cuda.math_sdp_enabled, cuda.enable_math_sdp, (True,)),
        _Setting(cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp, (True,)),
    ]


_HELD = {"cpu": _Held(_cpu_settings), "cuda": _Held(_cuda_settings)}


def exact_arithmetic(device: torch.device) -> AbstractContextManager[None]:
    """Products in full within the block: float32 without TF32 or bfloat16 inside, bfloat16 summed in float32.

    The settings are the process's: what was set before is put back when the last thread leaves.
    """
    return _HELD[device.type].hold()


def nvcc_version() -> str | None:
    """The CUDA compiler's release and place, from CUDA_HOME, PATH or the usual folder; None without one."""
    home = os.environ.get("CUDA_HOME")
    for place in (home and f"{home}/bin/nvcc", shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"):
        if place and (output := _version_output(place)):
            release = re.search(r"release ([\d.]+)", output)
            return f"{release[1] if release else 'unknown release'} ({place})"
    return None


def compiler_version() -> str | None:
    """The first line that the C++ compiler ($CXX, or the system's) prints of itself; None without one."""
    for command in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if command and (output := _version_output(command)):
            return output.splitlines()[0]
    return None


def _version_output(command: str) -> str | None:
    """What `command --version` prints; None where it cannot be run."""
    try:
        result = subprocess.run(
            [command, "--version"], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None


def package_version(name: str) -> str | None:
    """An installed distribution's version; None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
