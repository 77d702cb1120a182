"""The pieces of a run on a GPU: what each one does, its command, what it needs and how long it may take."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

CALL_SECONDS = 570.0  # of one command, where a dry run counts how many there would be
LONGEST = 600  # seconds that a piece may take at most: what is interrupted starts over
NO_DEPENDENCIES = ("-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--upgrade")

# Import name -> name of the distribution: what the pieces need besides PyTorch.
PACKAGES = {
    "transformers": "transformers",
    "diffusers": "diffusers",
    "importlib_metadata": "importlib_metadata",  # of diffusers
    "zipp": "zipp",
    "safetensors": "safetensors",
    "numpy": "numpy",
    "PIL": "pillow",
    "tqdm": "tqdm",
    "psutil": "psutil",
    "tabulate": "tabulate",
    "jinja2": "jinja2",
    "matplotlib": "matplotlib",
    "scipy": "scipy",
    "pytest": "pytest",
    "hypothesis": "hypothesis",
    "pybind11": "pybind11",
    "setuptools": "setuptools",
}


@dataclass(frozen=True)
class Gpu:
    """A GPU as PyTorch names it, and its architecture as CMake does."""

    name: str
    architecture: str

    @property
    def folder(self) -> str:
        """Its name as that of a folder."""
        words = "".join(letter if letter.isalnum() else " " for letter in self.name.lower()).split()
        return "-".join(words)


EXPECTED = Gpu("no GPU here", "90a-real")  # what a dry run stands on


def find_gpu() -> Gpu | None:
    """The first GPU that PyTorch can use."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(0)
    feature = "a" if (major, minor) == (9, 0) else ""  # Hopper's own instructions
    return Gpu(torch.cuda.get_device_name(0), f"{major}{minor}{feature}-real")


@dataclass(frozen=True)
class Site:
    """Where pieces run: the checkout, where results and checkpoints go, and what was brought along.

    Paths below the checkout are relative to it, as commands are run there: records name no machine's folders.
    """

    root: Path
    results: Path
    work: Path
    gpu: Gpu
    wheels: Path | None = None
    reference: Path | None = None
    python: str = sys.executable

    @property
    def packages(self) -> Path:
        """Where carried wheels are installed, apart from the machine's own packages."""
        return self.work / "packages"

    @property
    def checkpoint(self) -> Path:
        """The random checkpoint of the published size, as bench leaves it in its work folder."""
        from blip3o_rt.measure.validate.checkpoint import converted_folder  # PyTorch takes seconds to import

        return converted_folder("published", "bf16", self.work)

    def environment(self) -> dict[str, str]:
        """Of every command."""
        paths = [str(self.root / self.packages), os.environ.get("PYTHONPATH", "")]
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PYTHONUNBUFFERED": "1",
            **({"BLIP3O_REFERENCE": str(self.root / self.reference)} if self.reference else {}),
        }


def nowhere(_: Site) -> str | None:
    """A piece that is never left out."""
    return None


@dataclass(frozen=True)
class Piece:
    """One step of the run.

    budget: seconds, after which it is ended. command: program and arguments. needs: pieces that must be done
    on this machine first. tools: programs it calls. left_out: why it does not run here, None where it does.
    ready: of a piece that changes the machine, not the results: whether the machine is as it leaves it.
    checks: it says whether the code is right, so its outcome holds for that commit only.
    """

    name: str
    what: str
    budget: int
    command: Callable[[Site], list[str]]
    needs: tuple[str, ...] = ("packages", "build")
    tools: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    left_out: Callable[[Site], str | None] = nowhere
    ready: Callable[[Site], bool] | None = None
    checks: bool = False


# Packages and build


def missing_packages(site: Site) -> list[str]:
    """Distributions that neither the machine nor the folder of carried ones has."""
    return [
        distribution
        for module, distribution in PACKAGES.items()
        if find_spec(module) is None and not (site.root / site.packages / module).exists()
    ]


def install_wheels(site: Site) -> list[str]:
    wheels = sorted(map(str, (site.root / site.wheels).glob("*.whl"))) if site.wheels else []
    return [site.python, *NO_DEPENDENCIES, "--target", str(site.packages), *wheels]


def no_wheels(site: Site) -> str | None:
    if site.wheels:
        return None
    missing = ", ".join(missing_packages(site)) or "nothing"
    return f"{missing} is missing, and no wheels were brought along (--wheels)"


def built(site: Site) -> bool:
    """Whether the CUDA kernels can run here; asked of a process of its own, which sees a new build."""
    question = "import sys; from blip3o_rt.ops import native; sys.exit(native.cuda_unavailable() is not None)"
    command = [site.python, "-c", question]
    return subprocess.run(command, cwd=site.root, env=site.environment(), check=False).returncode == 0


def build(site: Site) -> list[str]:
    settings = ["BLIP3O_CUDA=on", f"BLIP3O_CUDA_ARCHS={site.gpu.architecture}"]
    return ["env", *settings, site.python, "setup.py", "build_ext", "--inplace"]


# Checks


WITHOUT_A_GPU = ("tests/csrc", "tests/triton_kernels")  # kernels compiled and interpreted on the CPU


def pytest(site: Site, *options: str) -> list[str]:
    """pytest, on several processes where that is installed."""
    parallel = ["-n", "8"] if find_spec("xdist") else []
    return [site.python, "-m", "pytest", "-p", "no:cacheprovider", *parallel, *options]


def suite(site: Site) -> list[str]:
    """The suite but for what runs the same without a GPU."""
    return pytest(site, *(f"--ignore={folder}" for folder in WITHOUT_A_GPU), "tests")


def suite_without_a_gpu(site: Site) -> list[str]:
    """The rest of the suite."""
    return pytest(site, *WITHOUT_A_GPU)


def sanitized(tool: str) -> Callable[[Site], list[str]]:
    """The op table on the GPU under one of compute-sanitizer's tools."""

    def command(site: Site) -> list[str]:
        sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        options = ["--tool", tool, "--target-processes", "all", "--error-exitcode", "9"]
        table = ["tests/ops/test_ops.py", "-k", "cuda or triton", "-p", "no:cacheprovider"]
        return [sanitizer, *options, site.python, "-m", "pytest", *table]

    return command


def validate(folder: str, *options: str) -> Callable[[Site], list[str]]:
    def command(site: Site) -> list[str]:
        place = ["--device", "cuda", "--out", str(site.results / folder)]
        return [site.python, "-m", "blip3o_rt", "validate", *options, *place]

    return command


def golden(name: str) -> Callable[[Site], list[str]]:
    def command(site: Site) -> list[str]:
        folder = (site.reference or Path("REFERENCE")) / name
        return validate(f"validate-golden-{name}", "--against", str(folder))(site)

    return command


def no_golden(name: str) -> Callable[[Site], str | None]:
    def left_out(site: Site) -> str | None:
        if site.reference is None:
            return "no recorded runs were brought along (--reference)"
        return (
            None if (site.root / site.reference / name).is_dir() else f"{site.reference} has no folder {name}"
        )

    return left_out


def validate_published(site: Site) -> list[str]:
    command = validate("validate-published", "--size", "published")(site)
    return [*command, "--work", str(site.work / "validate")]


# Measurements


def bench(folder: str, minutes: float, *options: str) -> Callable[[Site], list[str]]:
    def command(site: Site) -> list[str]:
        model = ["--size", "published", "--dtype", "bf16", "--device", "cuda", "--work", str(site.work)]
        effort = ["--budget", f"{minutes:g}", "--out", str(site.results / folder)]
        return [site.python, "-m", "blip3o_rt", "bench", *model, *options, *effort]

    return command


def no_fp8(site: Site) -> str | None:
    """Architectures before 8.9 multiply no 8-bit floats."""
    number = int("".join(filter(str.isdigit, site.gpu.architecture)))
    return None if number >= 89 else f"a GPU of architecture {number} has no products of 8-bit floats"


def checkpoint(site: Site) -> list[str]:
    """The smallest bench of the published size, for the random checkpoint that it leaves."""
    options = ["--stages", "dit.tables", "--peers", "none", "--quick", "--quiet"]
    command = bench("unused", 0.1, *options)(site)
    command[command.index("--out") + 1] = str(site.work / "first-bench")
    return command


def trace(site: Site) -> list[str]:
    """A short request of the published size: a published picture has too many tokens to look at."""
    options = [
        "--model",
        str(site.checkpoint),
        "--device",
        "cuda",
        "--dtype",
        "bf16",
        "--steps",
        "3",
        "--quiet",
    ]
    files = ["--trace", str(site.results / "trace" / "published.json.gz"), "--trace-tokens", "4"]
    out = ["--out", str(site.work / "traced.png")]
    return [site.python, "-m", "blip3o_rt", "generate", "a red circle", *options, *files, *out]


def trace_stages(site: Site) -> list[str]:
    """A call of every stage alone; the record that comes with it is of too few runs to keep."""
    files = ["--trace", str(site.results / "trace" / "stages.json.gz")]
    command = bench("unused", 0.1, "--stages", "all", "--peers", "none", "--quick", "--quiet", *files)(site)
    command[command.index("--out") + 1] = str(site.work / "traced-bench")
    return command


ALL_PEERS = ("--peers", "transformers,diffusers,published,compiled,graphed")
FAST_SWITCHES = ("--switch", "ar_weights=int8", "--switch", "dit_weights=fp8", "--switch", "step_cache=2")
MEASURES = ("packages", "build", "checkpoint")

PIECES = (
    Piece(
        "packages",
        "install the wheels brought along, apart from the machine's own packages",
        60,
        install_wheels,
        needs=(),
        left_out=no_wheels,
        ready=lambda site: not missing_packages(site),
    ),
    Piece(
        "build",
        "build _cpu and _cuda for this GPU",
        200,
        build,
        needs=("packages",),
        tools=("nvcc", "cmake", "ninja", "c++"),
        ready=built,
    ),
    Piece("suite", "the tests on this machine", 420, suite, checks=True),
    Piece(
        "memcheck",
        "the op table under compute-sanitizer: no access out of bounds",
        150,
        sanitized("memcheck"),
        tools=("compute-sanitizer",),
        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # every tensor an allocation of its own
        checks=True,
    ),
    Piece(
        "racecheck",
        "the op table under compute-sanitizer: no race in shared memory",
        150,
        sanitized("racecheck"),
        tools=("compute-sanitizer",),
        checks=True,
    ),
    Piece(
        "validate-shapes",
        "the embedded model",
        60,
        validate("validate-shapes", "--size", "shapes"),
        checks=True,
    ),
    *(
        Piece(
            f"validate-golden-{name}",
            f"the recorded run {name}",
            60,
            golden(name),
            left_out=no_golden(name),
            checks=True,
        )
        for name in ("t2i", "edit")
    ),
    Piece("validate-published", "random weights of the published size", 240, validate_published, checks=True),
    Piece(
        "checkpoint",
        "write the random checkpoint of the published size",
        180,
        checkpoint,
        ready=lambda site: (site.root / site.checkpoint).is_dir(),
    ),
    Piece(
        "bench-ops",
        "every kernel alone, out of the cache",
        120,
        bench("bench-ops", 1, "--ops"),
        needs=MEASURES,
    ),
    Piece(
        "bench-ar",
        "prompt and tokens beside all peers",
        400,
        bench("bench-ar", 4, "--stages", "ar", *ALL_PEERS),
        needs=MEASURES,
    ),
    Piece(
        "bench-dit",
        "connector, diffusion transformer and autoencoder beside all peers",
        420,
        bench("bench-dit", 4, "--stages", "connector,tatok,dit,vae", *ALL_PEERS),
        needs=MEASURES,
    ),
    Piece(
        "bench-image",
        "pictures end to end beside all peers",
        420,
        bench("bench-image", 4, "--stages", "image", *ALL_PEERS),
        needs=MEASURES,
    ),
    Piece(
        "bench-batch",
        "tokens and pictures of several at a time",
        300,
        bench("bench-batch", 3, "--stages", "ar.token,image", "--batch", "1,4,8,32", "--peers", "none"),
        needs=MEASURES,
    ),
    Piece(
        "bench-fast",
        "a picture end to end in the fast tier",
        300,
        bench("bench-fast", 3, "--stages", "image", "--peers", "none", "--tier", "fast", *FAST_SWITCHES),
        needs=MEASURES,
        left_out=no_fp8,
    ),
    Piece(
        "bench-ablate",
        "every switch off against on",
        420,
        bench("bench-ablate", 3, "--ablate"),
        needs=MEASURES,
    ),
    Piece("trace", "a request with all its ranges and kernels", 120, trace, needs=MEASURES),
    Piece("trace-stages", "a call of every stage with all its kernels", 120, trace_stages, needs=MEASURES),
    Piece("suite-without-gpu", "the tests of kernels on the CPU", 540, suite_without_a_gpu, checks=True),
)


def named(name: str) -> Piece:
    """The piece of that name. Raises KeyError."""
    return next(piece for piece in PIECES if piece.name == name)
