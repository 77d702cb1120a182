"""blip3o-rt doctor: what this machine has, which implementation each op would use, and what is missing."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from tabulate import tabulate

from blip3o_rt import __version__

if TYPE_CHECKING:
    from blip3o_rt.machine import Machine

SUMMARY = "what this machine has, what each op would run on, what is missing and how to get it"
DESCRIPTION = f"Print {SUMMARY}."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    parser.add_argument("--json", action="store_true", help="print it as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the findings; what is missing is no failure, so the exit code is 0."""
    findings = examine()
    print(json.dumps(asdict(findings), indent=2) if arguments.json else as_text(findings))
    return 0


@dataclass(frozen=True)
class OpChoice:
    """Which implementation an op's calls of one device and dtype go to, and why not to the others."""

    op: str
    device: str
    dtype: str
    chosen: str
    passed_over: dict[str, str]


@dataclass(frozen=True)
class Extension:
    """A native module: whether it can be used, and how it is set up or why it cannot."""

    name: str
    usable: bool
    detail: str


@dataclass(frozen=True)
class Findings:
    """Everything doctor prints."""

    version: str
    machine: Machine
    auto_dtype: str  # what the dtype "auto" is on the CPU, for a checkpoint of bfloat16
    extensions: list[Extension]
    ops: list[OpChoice]
    missing: list[str]


def examine() -> Findings:
    """Look at the machine, the native modules and the op registry."""
    import torch  # which takes seconds to import: not for --help

    from blip3o_rt import machine
    from blip3o_rt.precision import resolve_precision

    found, modules = machine.describe(), native_modules()
    devices = ["cpu", "cuda"] if found.gpus else ["cpu"]
    return Findings(
        version=__version__,
        machine=found,
        auto_dtype=resolve_precision("auto", torch.device("cpu")).name,
        extensions=modules,
        ops=[choice for device in devices for choice in op_choices(device)],
        missing=missing(found, modules),
    )


def native_modules() -> list[Extension]:
    """The states of blip3o_rt._cpu, blip3o_rt._cuda and the Triton kernels."""
    from blip3o_rt.ops import native, triton_backend

    without_cpu, on_cpu = native.cpu_unavailable(), ""
    if without_cpu is None:
        module = native.cpu()
        on_cpu = f"{module.isa()} (of {', '.join(module.isas())}), {module.num_threads()} threads"
    states = (
        ("_cpu", without_cpu, on_cpu),
        ("_cuda", native.cuda_unavailable(), "usable"),
        ("triton_kernels", triton_backend.unavailable(), "usable"),
    )
    return [Extension(name, reason is None, reason or detail) for name, reason, detail in states]


def op_choices(device: str) -> list[OpChoice]:
    """The choices of every op on a device type, for every precision that it computes in."""
    from blip3o_rt import ops
    from blip3o_rt.precision import BF16, FP32, MIXED

    found = []
    for precision in (FP32, BF16, *((MIXED,) if device == "cpu" else ())):
        choices = ops.choices(device, precision.arithmetic, precision.weights)
        for op in sorted({choice.op for choice in choices}):
            standing = [choice for choice in choices if choice.op == op]
            chosen = next((choice.implementation for choice in standing if choice.chosen), "none")
            reasons = {c.implementation: c.reason or "" for c in standing if not c.chosen}
            found.append(OpChoice(op, device, precision.name, chosen, reasons))
    return found


def missing(found: Machine, extensions: list[Extension]) -> list[str]:
    """One line for everything that would make this faster, with how to get it."""
    from blip3o_rt.graphs import graphs_wanted

    lines = [f"{extension.name}: {extension.detail}" for extension in extensions if not extension.usable]
    if not found.gpus:
        lines.append(f"GPU: {found.gpu_status}")
    elif not graphs_wanted():
        lines.append("CUDA graphs: turned off by BLIP3O_GRAPHS=off; unset it")
    if found.nvcc is None:
        lines.append("nvcc: not found; install the CUDA toolkit and build again to get _cuda")
    if found.compiler is None:
        lines.append("C++ compiler: not found; install g++ or clang++ and build again to get _cpu")
    return lines


def as_text(findings: Findings) -> str:
    """The findings as people read them."""
    sections = [
        tabulate(machine_rows(findings.machine), tablefmt="plain"),
        tabulate(package_rows(findings), tablefmt="plain", disable_numparse=True),
        tabulate(op_rows(findings.ops), ["op", "device", "dtype", "implementation", "passed over"]),
        "\n".join(["missing:", *(f"  {line}" for line in findings.missing)]) if findings.missing else "",
    ]
    return "\n\n".join([f"blip3o_rt {findings.version}", *filter(None, sections)])


def machine_rows(machine: Machine) -> list[list[str]]:
    """The machine in two columns."""
    processor, memory = machine.processor, machine.memory
    cores = f"{processor.physical_cores} cores, {processor.usable_cores} usable threads"
    limited = " (limited by a cgroup)" if memory.limit == "cgroup" else ""
    gpus = [
        f"{gpu.name}, compute capability {gpu.compute_capability}, "
        f"{free_of(gpu.free_memory, gpu.total_memory)}"
        for gpu in machine.gpus
    ]
    return [
        ["system", f"{machine.system}, Python {machine.python}"],
        ["processor", f"{processor.model} ({processor.architecture}), {cores}"],
        ["vector extensions", ", ".join(processor.isa) or "none known"],
        ["memory", free_of(memory.available, memory.total) + limited],
        *([f"cuda:{index}", gpu] for index, gpu in enumerate(gpus)),
        *([] if gpus else [["GPU", "none"]]),
        ["C++ compiler", machine.compiler or "none"],
        ["nvcc", machine.nvcc or "none"],
    ]


def free_of(free: int, total: int) -> str:
    """Bytes that are free, in words."""
    from blip3o_rt.machine import format_bytes

    return f"{format_bytes(free)} free of {format_bytes(total)}"


def package_rows(findings: Findings) -> list[list[str]]:
    """Packages with their versions, the native modules, and what the dtype "auto" is."""
    from blip3o_rt.precision import IN_WORDS

    packages = [[name, version or "not installed"] for name, version in findings.machine.packages.items()]
    modules = [[e.name, e.detail if e.usable else "not usable, see missing"] for e in findings.extensions]
    auto = ["dtype auto on the CPU", IN_WORDS.get(findings.auto_dtype, findings.auto_dtype)]
    return [*packages, *modules, auto]


def op_rows(choices: list[OpChoice]) -> list[list[str]]:
    """One row per op, device and outcome; dtypes with the same outcome share it."""
    merged: dict[tuple[str, str, str, str], list[str]] = {}
    for choice in choices:
        passed_over = "; ".join(f"{name}: {reason}" for name, reason in choice.passed_over.items())
        merged.setdefault((choice.op, choice.device, choice.chosen, passed_over), []).append(choice.dtype)
    return [
        [op, device, ", ".join(dtypes), chosen, passed_over]
        for (op, device, chosen, passed_over), dtypes in merged.items()
    ]
