"""blip3o-rt doctor: the truth about the registry and the machine; a missing thing is no failure."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from blip3o_rt import __version__, machine, ops, precision
from blip3o_rt.cli import doctor
from blip3o_rt.ops import native, triton_backend
from tests.cli.conftest import Command

GIB = 2**30


def test_json_lists_every_op_for_every_precision(command: Command) -> None:
    assert command("doctor", "--json") == 0
    found = json.loads(command.output)
    assert found["version"] == __version__
    on_cpu = {(choice["op"], choice["dtype"]) for choice in found["ops"] if choice["device"] == "cpu"}
    assert on_cpu == {(op, dtype) for op in ops.all_ops() for dtype in ("fp32", "bf16", "mixed")}


def test_choices_are_what_the_registry_does(command: Command) -> None:
    with ops.force("rms_norm", "torch"):
        command("doctor", "--json")
        choices = {
            choice["op"]: choice["chosen"]
            for choice in json.loads(command.output)["ops"]
            if (choice["device"], choice["dtype"]) == ("cpu", "fp32")
        }
        with ops.recording_usage() as used:
            ops.rms_norm(torch.ones(2, 8), torch.ones(8), 1e-6)
            ops.silu_mul(torch.ones(2, 8))
        assert choices["rms_norm"] == "torch"
        assert used == {name: {choices[name]} for name in ("rms_norm", "silu_mul")}


def test_every_implementation_passed_over_has_a_reason(command: Command) -> None:
    for choice in doctor.op_choices("cpu"):
        names = {choice.chosen, *choice.passed_over}
        assert names == set(ops.all_ops()[choice.op].implementation_names)
        assert all(choice.passed_over.values())


def test_text_names_everything(command: Command) -> None:
    assert command("doctor") == 0
    for word in (*ops.all_ops(), "processor", "memory", "nvcc", "torch", torch.__version__, "_cpu", "_cuda"):
        assert word in command.output


def test_without_native_modules_gpu_and_compilers(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = dataclasses.replace(
        machine.describe(), gpus=(), gpu_status="no GPU: buy one", compiler=None, nvcc=None
    )
    monkeypatch.setattr(machine, "describe", lambda: bare)
    monkeypatch.setattr(native, "cpu_unavailable", lambda: "_cpu is not built; install a compiler")
    monkeypatch.setattr(native, "cuda_unavailable", lambda: "_cuda is not built; install nvcc")
    monkeypatch.setattr(triton_backend, "unavailable", lambda: "triton is not installed; install it")
    assert command("doctor") == 0
    lines = command.output.split("missing:\n")[1].splitlines()
    missing = ["_cpu", "_cuda", "triton_kernels", "GPU", "nvcc", "C++ compiler"]
    assert [line.split(":")[0].strip() for line in lines] == missing
    assert "_cpu is not built; install a compiler" in lines[0]


def test_gpus_are_listed_with_their_memory(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = machine.Gpu("NVIDIA H200", "9.0", total_memory=140 * GIB, free_memory=139 * GIB)
    with_gpu = dataclasses.replace(machine.describe(), gpus=(gpu,), gpu_status="found")
    monkeypatch.setattr(machine, "describe", lambda: with_gpu)
    assert command("doctor") == 0
    assert "NVIDIA H200, compute capability 9.0, 139.0 GiB free of 140.0 GiB" in command.output
    command("doctor", "--json")
    devices = {choice["device"] for choice in json.loads(command.output)["ops"]}
    assert devices == {"cpu", "cuda"}
    assert "CUDA graphs" not in command.output
    monkeypatch.setenv("BLIP3O_GRAPHS", "off")
    command("doctor")
    assert "CUDA graphs: turned off by BLIP3O_GRAPHS=off; unset it" in command.output


def test_rows_share_what_dtypes_have_in_common() -> None:
    choices = [
        doctor.OpChoice("norm", "cpu", "fp32", "cpu", {"torch": "'cpu' comes first"}),
        doctor.OpChoice("norm", "cpu", "bf16", "cpu", {"torch": "'cpu' comes first"}),
        doctor.OpChoice("conv", "cpu", "fp32", "cpu", {}),
        doctor.OpChoice("conv", "cpu", "bf16", "torch", {"cpu": "takes float32, got bfloat16"}),
    ]
    assert doctor.op_rows(choices) == [
        ["norm", "cpu", "fp32, bf16", "cpu", "torch: 'cpu' comes first"],
        ["conv", "cpu", "fp32", "cpu", ""],
        ["conv", "cpu", "bf16", "torch", "cpu: takes float32, got bfloat16"],
    ]


@pytest.mark.skipif(native.cpu_module() is None, reason="needs the CPU kernels")
def test_auto_is_said_in_words(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    processor = dataclasses.replace(machine.processor(), isa=("avx2",))
    monkeypatch.setattr(precision, "processor", lambda: processor)
    assert command("doctor") == 0
    assert "mixed (bf16 weights, float32 arithmetic)" in command.output
    command("doctor", "--json")
    found = json.loads(command.output)
    assert found["auto_dtype"] == "mixed"
    chosen = {c["dtype"]: c["chosen"] for c in found["ops"] if c["op"] == "linear"}
    assert (chosen["fp32"], chosen["mixed"]) == ("torch", "cpu")
