"""What the CUDA kernels take of a multiprocessor, by the words of the compiler.

As a program (`python -m tests.csrc.resources`): writes the table beside it anew.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).parents[2] / "csrc"
TABLE = Path(__file__).with_name("resources.json")
ARCHITECTURES = ("sm_80", "sm_89", "sm_90a")
OPS = sorted(path.stem for path in (CSRC / "cuda").glob("*.cu"))
ARGUMENTS = {"f": "float", "a": "int8", "13__nv_bfloat16": "bf16", "Lb0E": "false", "Lb1E": "true"}
# A type or a choice of that namespace is NS1_4Int8E, LNS1_5LoadsE2E.
ARGUMENT = r"[fa]|13__nv_bfloat16|L?NS\d_\d+[A-Z]\w*?E(?:\d+E)?|L[ib]\d+E"


@dataclass
class Resources:
    """Of one kernel: registers, bytes of stack and of spills per thread, bytes of shared memory per block."""

    registers: int = 0
    shared: int = 0
    stack: int = 0
    spills: int = 0

    def __str__(self) -> str:
        return f"{self.registers} registers, {self.shared} B shared, {self.stack} B stack"


def release(nvcc: str) -> str:
    """The release of the toolkit, as "13.0": others allocate registers differently."""
    said = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    found = re.search(r"release (\d+\.\d+)", said)
    return found[1] if found else "unknown"


def measure(nvcc: str, op: str, architecture: str, folder: Path) -> dict[str, Resources]:
    """Compiles an op's kernels for one architecture, warnings as errors: what each takes."""
    options = ["-std=c++17", "-cubin", f"-arch={architecture}", "-Werror", "all-warnings", "-Xptxas", "-v"]
    includes = [f"-I{CSRC}", f"-I{CSRC / 'include'}"]
    target = folder / f"{op}.{architecture}.cubin"
    done = subprocess.run(
        [nvcc, *options, *includes, str(CSRC / "cuda" / f"{op}.cu"), "-o", str(target)],
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    return parse(done.stderr)


def parse(words: str) -> dict[str, Resources]:
    """The kernels in the words of ptxas. A function that a kernel calls is described right after it."""
    kernels: dict[str, Resources] = {}
    kernel = Resources()
    in_kernel = False
    for line in words.splitlines():
        if entry := re.search(r"Compiling entry function '(\w+)'", line):
            symbol = entry[1]
            kernel = kernels[kernel_name(symbol)] = Resources()
        elif function := re.search(r"Function properties for (\w+)", line):
            in_kernel = function[1] == symbol
        elif sizes := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill", line
        ):
            kernel.stack += int(sizes[1]) if in_kernel else 0
            kernel.spills += int(sizes[2]) + int(sizes[3])
        elif used := re.search(r"Used (\d+) registers(?:.* (\d+) bytes smem)?", line):
            kernel.registers, kernel.shared = int(used[1]), int(used[2] or 0)
    return kernels


def kernel_name(symbol: str) -> str:
    """A kernel in an anonymous namespace of blip3o::cuda, as "rms_norm_kernel<bf16, 8>"."""
    rest = symbol.removeprefix("_ZN6blip3o4cuda")
    _, rest = counted(rest)  # the namespace
    name, rest = counted(rest)
    found = re.match(rf"I((?:{ARGUMENT})+)E", rest)
    if found is None:
        return name
    return f"{name}<{', '.join(argument_name(a) for a in re.findall(ARGUMENT, found[1]))}>"


def argument_name(argument: str) -> str:
    """A template argument in words: a type or a number."""
    if choice := re.fullmatch(r"L?NS\d_(\w*?)E(?:(\d+)E)?", argument):
        return counted(choice[1])[0] + (f" {choice[2]}" if choice[2] else "")
    return ARGUMENTS.get(argument, argument[2:-1])


def counted(text: str) -> tuple[str, str]:
    """A name with its length before it, and what follows."""
    digits = len(text) - len(text.lstrip("0123456789"))
    end = digits + int(text[:digits])
    return text[digits:end], text[end:]


def main() -> None:
    """Writes the table."""
    import tempfile

    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise SystemExit("needs nvcc")
    table = {"nvcc": release(nvcc)}
    with tempfile.TemporaryDirectory() as folder:
        for architecture in ARCHITECTURES:
            for op in OPS:
                for kernel, resources in sorted(measure(nvcc, op, architecture, Path(folder)).items()):
                    table[f"{architecture} {kernel}"] = str(resources)
                    if resources.spills:
                        print(f"{architecture} {kernel}: {resources.spills} bytes of spills")
    TABLE.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
