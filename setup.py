"""Lists the packages and builds the extension modules with CMake; the rest is in pyproject.toml.

BLIP3O_CUDA=auto|on|off   build _cuda if nvcc is found (auto, the default), always, or never
BLIP3O_CUDA_ARCHS=...     its architectures, as CMAKE_CUDA_ARCHITECTURES (default: those of CMakeLists.txt)
BLIP3O_WERROR=1           compiler warnings are errors

_cpu needs a C++17 compiler. Without one the package still installs, and its ops run on torch.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, SetupError

ROOT = Path(__file__).resolve().parent
CPU, CUDA = "blip3o_rt._cpu", "blip3o_rt._cuda"
TRITON = "blip3o_rt.triton_kernels"


def say(line: str) -> None:
    print(f"blip3o_rt: {line}", file=sys.stderr, flush=True)


def find_cxx() -> str | None:
    """The C++ compiler CMake will take, or None."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next(filter(None, map(shutil.which, names)), None)


def find_nvcc() -> str | None:
    """nvcc from CUDACXX, the PATH, or CUDA_HOME (unset: where the toolkit installs itself)."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    names = [os.environ.get("CUDACXX"), "nvcc", str(Path(home, "bin", "nvcc"))]
    return next(filter(None, (shutil.which(name) for name in names if name)), None)


def modules_to_build() -> list[Extension]:
    """What this machine can build, with a line on each decision. Raises SetupError for a bad BLIP3O_CUDA."""
    if find_cxx() is None:
        say("WARNING: no C++ compiler was found: nothing is built, ops run on torch (slower)")
        return []
    modules = [Extension(CPU, [])]
    choice, nvcc = os.environ.get("BLIP3O_CUDA", "auto"), find_nvcc()
    if choice not in ("auto", "on", "off"):
        raise SetupError(f"BLIP3O_CUDA is '{choice}'; accepted: auto, on, off")
    if choice == "on" and nvcc is None:
        raise SetupError("BLIP3O_CUDA=on, but nvcc was not found; install the CUDA toolkit or set CUDA_HOME")
    if choice == "off":
        say("_cuda is not built: BLIP3O_CUDA=off")
    elif nvcc is None:
        say("_cuda is not built: nvcc was not found (BLIP3O_CUDA=auto)")
    else:
        say(f"_cuda is built with {nvcc} (BLIP3O_CUDA={choice})")
        modules.append(Extension(CUDA, [], optional=choice == "auto"))
    return modules


class CMakeBuild(build_ext):
    """Each module is one CMake target in a build folder of its own, so that one cannot break the other."""

    def build_extension(self, ext: Extension) -> None:
        target = ext.name.rpartition(".")[2]
        build = Path(self.build_temp).resolve() / target
        destination = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            subprocess.run(self.configure_command(ext, build), check=True)
            subprocess.run(["cmake", "--build", str(build), "--target", target], check=True)
        except FileNotFoundError as error:
            raise CompileError(f"cmake was not found; pip install cmake ninja ({error})") from error
        except subprocess.CalledProcessError as error:
            if ext.optional:
                say("WARNING: _cuda did not compile and is left out (see above); BLIP3O_CUDA=off skips it")
            raise CompileError(f"building {target} failed") from error
        destination.parent.mkdir(parents=True, exist_ok=True)
        partial = destination.with_suffix(".partial")
        shutil.copy2(build / destination.name, partial)
        partial.replace(destination)  # a running process keeps the file that it has mapped

    def configure_command(self, ext: Extension, build: Path) -> list[str]:
        import pybind11

        command = ["cmake", "-S", str(ROOT), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release"]
        if ninja := shutil.which("ninja"):
            command += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        command += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
        command += [f"-DBLIP3O_WERROR={'ON' if os.environ.get('BLIP3O_WERROR') == '1' else 'OFF'}"]
        if ext.name == CUDA:
            command += ["-DBLIP3O_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={find_nvcc()}"]
            if architectures := os.environ.get("BLIP3O_CUDA_ARCHS"):
                command += [f"-DCMAKE_CUDA_ARCHITECTURES={architectures}"]
        return command


setup(
    packages=[*find_namespace_packages(include=["blip3o_rt*"]), TRITON],
    package_dir={TRITON: "triton_kernels"},  # inference servers install a top-level package of that name
    ext_modules=modules_to_build(),
    cmdclass={"build_ext": CMakeBuild},
)
