"""The machine code of the CUDA kernels, compiled ahead of time and disassembled."""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.csrc.resources import Resources, kernel_name, measure

NONE = 7  # in the place of a scoreboard
LINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;\s+/\* 0x\w+ \*/")
SECOND_HALF = re.compile(r"/\* (0x[0-9a-f]{16}) \*/")
LABEL = re.compile(r"(\.L_[\w$]+):")


def find_nvdisasm() -> str | None:
    """The toolkit's disassembler, or the one in Triton's package."""
    triton = importlib.util.find_spec("triton")
    folders = triton.submodule_search_locations if triton else None
    return shutil.which("nvdisasm") or next(
        (str(tool) for folder in folders or () for tool in Path(folder).glob("backends/nvidia/bin/nvdisasm")),
        None,
    )


NVCC, NVDISASM = shutil.which("nvcc"), find_nvdisasm()
MISSING = [name for name, tool in (("nvcc", NVCC), ("nvdisasm", NVDISASM)) if tool is None]
needs_tools = pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}")


@dataclass(frozen=True)
class Instruction:
    """One instruction: LDG.E.128 and its operands; a predicate before it is left out.

    signals, releases: the scoreboard that says that its result is there, or that its operands were read.
    waits: those that it waits for.
    """

    opcode: str
    operands: str
    signals: int | None = None
    releases: int | None = None
    waits: frozenset[int] = frozenset()

    def is_a(self, *names: str) -> bool:
        """Whether it is one of these with any modifiers: `LDG`, or `DEPBAR.LE` with its first."""
        return any(f"{self.opcode}.".startswith(f"{name}.") for name in names)

    def __str__(self) -> str:
        return f"{self.opcode} {self.operands}".strip()


@dataclass
class Kernel:
    """The instructions of a kernel, what it takes of a multiprocessor, and where its labels stand."""

    resources: Resources = field(default_factory=Resources)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    def loops(self) -> Iterator[list[Instruction]]:
        """The instructions from each label to a branch back to it."""
        for last, instruction in enumerate(self.instructions):
            target = re.search(r"\.L_[\w$]+", instruction.operands)
            if not instruction.is_a("BRA") or target is None:
                continue
            first = self.labels[target[0]]
            if first < last:  # a branch to itself fills the end of a kernel
                yield self.instructions[first : last + 1]

    def loop_with(self, name: str) -> list[Instruction]:
        """The shortest loop that has such an instruction."""
        return min((loop for loop in self.loops() if select(loop, name)), key=len)


def select(instructions: Sequence[Instruction], *names: str) -> list[Instruction]:
    """Those that are one of `names` (`Instruction.is_a`)."""
    return [instruction for instruction in instructions if instruction.is_a(*names)]


@functools.cache
def kernels_of(op: str, architecture: str = "sm_90a") -> dict[str, Kernel]:
    """The kernels of an op's .cu file by their names, as "rms_norm_kernel<bf16, 8>"."""
    assert NVCC is not None
    assert NVDISASM is not None
    with tempfile.TemporaryDirectory() as folder:
        resources = measure(NVCC, op, architecture, Path(folder))
        command = [NVDISASM, "-hex", "-c", str(Path(folder, f"{op}.{architecture}.cubin"))]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    kernels = parse(text)
    for name, kernel in kernels.items():
        kernel.resources = resources[name]
    return kernels


def parse(text: str) -> dict[str, Kernel]:
    """The kernels in what nvdisasm says."""
    kernels: dict[str, Kernel] = {}
    kernel = Kernel()
    lines = text.splitlines()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if line.startswith(".text.") and line.endswith(":"):
            kernel = kernels[kernel_name(line[len(".text.") : -1])] = Kernel()
        elif label := LABEL.match(line):
            kernel.labels[label[1]] = len(kernel.instructions)
        elif found := LINE.search(line):
            half = SECOND_HALF.search(following)
            assert half is not None, f"no second half of {line!r}"
            kernel.instructions.append(Instruction(found[1], found[2], *scoreboards(int(half[1], 16))))
    return kernels


def scoreboards(second_half: int) -> tuple[int | None, int | None, frozenset[int]]:
    """What an instruction signals, releases and waits for, by its upper 64 bits (Volta and newer)."""
    control = second_half >> 41
    signals, releases, waits = control >> 5 & 7, control >> 8 & 7, control >> 11 & 63
    return (
        None if signals == NONE else signals,
        None if releases == NONE else releases,
        frozenset(board for board in range(6) if waits >> board & 1),
    )
