"""What the machine has is read right: cgroup limits, devices and their remedies, compilers, packages."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from blip3o_rt import machine
from blip3o_rt.errors import DeviceError, InsufficientMemoryError

CPU = torch.device("cpu")
GIB = 2**30


@pytest.fixture
def sixteen_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 16 GiB with 10 GiB free."""
    state = SimpleNamespace(total=16 * GIB, available=10 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: state)


def write(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def cgroup_v2(root: Path, group: str, limit: object, used: int, inactive_file: int = 0) -> None:
    folder = root / "sys/fs/cgroup" / group
    write(folder / "memory.max", limit)
    write(folder / "memory.current", used)
    write(folder / "memory.stat", f"anon 1\nfile {inactive_file}\ninactive_file {inactive_file}")


@pytest.mark.usefixtures("sixteen_gib")
class TestMemory:
    def test_without_cgroups(self, tmp_path: Path) -> None:
        assert machine.memory(tmp_path) == machine.Memory(16 * GIB, 10 * GIB, "machine")

    def test_v2_limit(self, tmp_path: Path) -> None:
        write(tmp_path / "proc/self/cgroup", "0::/job")
        cgroup_v2(tmp_path, "job", 4 * GIB, 3 * GIB, inactive_file=GIB)
        assert machine.memory(tmp_path) == machine.Memory(4 * GIB, 2 * GIB, "cgroup")

    def test_v2_limit_of_a_parent_holds_too(self, tmp_path: Path) -> None:
        write(tmp_path / "proc/self/cgroup", "0::/a/b")
        cgroup_v2(tmp_path, "a", 5 * GIB, 4 * GIB)
        cgroup_v2(tmp_path, "a/b", 8 * GIB, 1 * GIB)
        assert machine.memory(tmp_path) == machine.Memory(5 * GIB, 1 * GIB, "cgroup")

    def test_v2_without_a_limit(self, tmp_path: Path) -> None:
        write(tmp_path / "proc/self/cgroup", "0::/")
        cgroup_v2(tmp_path, "", "max", 3 * GIB)
        assert machine.memory(tmp_path).limit == "machine"

    def test_v1_limit(self, tmp_path: Path) -> None:
        write(tmp_path / "proc/self/cgroup", "5:cpu,cpuacct:/job\n4:memory:/job\n0::/")
        folder = tmp_path / "sys/fs/cgroup/memory/job"
        write(folder / "memory.limit_in_bytes", 2 * GIB)
        write(folder / "memory.usage_in_bytes", GIB)
        write(folder / "memory.stat", f"inactive_file 1\ntotal_inactive_file {GIB // 2}")
        write(folder.parent / "memory.limit_in_bytes", 2**63 - 4096)
        write(folder.parent / "memory.usage_in_bytes", 3 * GIB)
        write(folder.parent / "memory.stat", "total_inactive_file 0")
        assert machine.memory(tmp_path) == machine.Memory(2 * GIB, 3 * GIB // 2, "cgroup")

    def test_a_full_cgroup_has_nothing_free(self, tmp_path: Path) -> None:
        write(tmp_path / "proc/self/cgroup", "0::/job")
        cgroup_v2(tmp_path, "job", 4 * GIB, 5 * GIB)
        assert machine.memory(tmp_path).available == 0

    def test_too_little_says_both_figures(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(machine, "memory", lambda: machine.Memory(16 * GIB, 10 * GIB, "machine"))
        machine.require_memory(10 * GIB, "loading the model", CPU, "buy more")
        with pytest.raises(InsufficientMemoryError) as caught:
            machine.require_memory(10 * GIB + GIB // 2, "loading the model", CPU, "buy more")
        message = str(caught.value)
        assert message == (
            "loading the model needs 10.5 GiB of memory, this machine has 10.0 GiB free: buy more"
        )


@pytest.mark.parametrize("needed", [10 * GIB + 1, 10 * GIB + 10**6])
def test_two_figures_never_read_the_same(needed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory", lambda: machine.Memory(16 * GIB, 10 * GIB, "machine"))
    with pytest.raises(InsufficientMemoryError) as found:
        machine.require_memory(needed, "loading the model", CPU, "buy more")
    wanted, free = map(float, re.findall(r"([\d.]+) GiB", str(found.value)))
    assert wanted > free


@pytest.mark.parametrize(("count", "text"), [(0, "0 MiB"), (2**29, "512 MiB"), (3 * 2**29, "1.5 GiB")])
def test_bytes_in_words(count: int, text: str) -> None:
    assert machine.format_bytes(count) == text


class TestDevice:
    @pytest.mark.parametrize(
        "name", ["", "gpu", "CPU", "cuda:", "cuda:-1", "cuda:x", "cpu:0", "cuda:0 ", "mps"]
    )
    def test_unknown_names(self, name: str) -> None:
        with pytest.raises(DeviceError, match="accepted are auto, cpu, cuda and cuda:N"):
            machine.resolve_device(name)

    def test_cpu_needs_nothing(self) -> None:
        assert machine.resolve_device("cpu") == torch.device("cpu")
        assert machine.resolve_device(torch.device("cpu")) == torch.device("cpu")

    def test_cpu_build_of_torch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.version, "cuda", None)
        assert machine.resolve_device("auto") == torch.device("cpu")
        for name in ("cuda", "cuda:0"):
            with pytest.raises(
                DeviceError, match=r"built without CUDA: install a CUDA build .* or choose device cpu"
            ):
                machine.resolve_device(name)

    def test_cuda_build_without_a_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert machine.resolve_device("auto") == torch.device("cpu")
        with pytest.raises(DeviceError, match=r"install an NVIDIA driver for CUDA 13\.0"):
            machine.resolve_device("cuda")

    def test_two_gpus(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        assert machine.resolve_device("auto") == torch.device("cuda", 0)
        assert machine.resolve_device("cuda") == torch.device("cuda", 0)
        assert machine.resolve_device("cuda:1") == torch.device("cuda", 1)
        with pytest.raises(DeviceError, match="cuda:0 to cuda:1"):
            machine.resolve_device("cuda:2")

    def test_gpu_memory_is_asked_of_the_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (GIB, 80 * GIB))
        machine.require_memory(GIB, "the model", torch.device("cuda", 0), "buy more")
        with pytest.raises(
            InsufficientMemoryError, match=r"needs 2\.0 GiB of memory, cuda:0 has 1\.0 GiB free"
        ):
            machine.require_memory(2 * GIB, "the model", torch.device("cuda", 0), "buy more")


def test_description_is_json_and_true() -> None:
    described = json.loads(json.dumps(asdict(machine.describe())))
    assert described["packages"]["torch"] == torch.__version__
    assert described["processor"]["usable_cores"] == len(os.sched_getaffinity(0))
    assert 0 < described["memory"]["available"] <= described["memory"]["total"]
    assert (described["gpu_status"] == "found") == torch.cuda.is_available()
    # torch's own reading of the processor, where it has one
    for name, torch_name in {"avx2": "avx2", "avx512f": "avx512_f"}.items():
        assert (name in described["processor"]["isa"]) == torch.cpu.get_capabilities().get(torch_name, False)


def test_nvcc_is_found_in_cuda_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin/nvcc"
    write(
        program, "#!/bin/sh\necho 'nvcc: NVIDIA (R)'\necho 'Cuda compilation tools, release 13.1, V13.1.80'"
    )
    program.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert machine.nvcc_version() == f"13.1 ({program})"


def test_a_broken_compiler_is_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "c++", "#!/bin/sh\nexit 1")
    (tmp_path / "c++").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert machine.compiler_version() is None


def test_packages() -> None:
    assert machine.package_version("torch") == torch.__version__
    assert machine.package_version("no-such-distribution") is None
