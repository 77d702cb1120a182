"""The pieces of a run on a GPU in order of worth: what each does, its command and its seconds.

    python -m benchmarks.pieces build|embedded|products|kernels|dependent FOLDER    run one in Python

Nothing is needed but a checkout, PyTorch with Triton and transformers, the packages the runtime depends on,
pytest, cmake, nvcc and pybind11's headers: no network, no pip, no installed package, no checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "transformers", "safetensors", "numpy", "PIL", "tqdm", "psutil", "tabulate")
BUILD_PACKAGES = ("pytest", "pybind11")
SIZE = ("--model", "published", "--dtype", "bf16", "--device", "cuda", "--quiet")
FAST = ("--switch", "ar_weights=int8", "--switch", "dit_weights=fp8", "--switch", "step_cache=2")
SANITIZED = "cuda and (row_linear or decode_attention or sample_tokens or rms_norm)"
GPU_TESTS = ("tests/ops/test_attention_on_gpu.py", "tests/ops/test_fused_on_gpu.py", "tests/test_graphs.py")


@dataclass(frozen=True)
class Site:
    """Where pieces run. results, work: folders of what is measured and of what is made on the way."""

    results: Path
    work: Path
    architecture: str = "90a-real"
    python: str = sys.executable

    def environment(self) -> dict[str, str]:
        """Of every command: carried packages are found, and Triton's cache is shared."""
        paths = [str(self.work / "packages"), os.environ.get("PYTHONPATH", "")]
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PYTHONUNBUFFERED": "1",
            "TRITON_CACHE_DIR": str(self.work / "triton"),
        }


@dataclass(frozen=True)
class Piece:
    """One step of a run.

    Attributes:
        seconds: after which it is ended; what it has written by then counts.
        command: program and arguments.
        essential: whether time is kept for it, whatever comes before it.
        call: of the first or of the second call.
    """

    name: str
    what: str
    seconds: int
    command: Callable[[Site], list[str]]
    essential: bool = False
    call: int = 1


def python(name: str) -> Callable[[Site], list[str]]:
    """The command of a piece that is a function of this file."""
    return lambda site: [site.python, "-m", "benchmarks.pieces", name, str(site.results)]


def bench(folder: str, *options: str) -> Callable[[Site], list[str]]:
    """The command of a bench at the published size."""

    def command(site: Site) -> list[str]:
        places = ("--work", str(site.work), "--out", str(site.results / folder))
        return [site.python, "-m", "blip3o_rt", "bench", *SIZE, *options, *places]

    return command


def tests(*options: str) -> Callable[[Site], list[str]]:
    return lambda site: [site.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]


def sanitized(tool: str) -> Callable[[Site], list[str]]:
    """Some of the op table under one of compute-sanitizer's tools."""

    def command(site: Site) -> list[str]:
        sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        options = ["--tool", tool, "--target-processes", "all", "--error-exitcode", "9"]
        return [sanitizer, *options, *tests("tests/ops/test_ops.py", "-k", SANITIZED)(site)]

    return command


def compiled(line: str) -> Piece:
    options = ("--lines", line, "--baselines", "compiled,graphed", "--runs", "3")
    what = f"{line} beside compiled and graphed baselines"
    return Piece(f"compiled-{line}", what, 50, bench(f"compiled-{line}", *options), call=2)


HEADLINE = ("--lines", "ar.token,dit.step,vae.decode,image", "--baselines", "none", "--runs", "5")
EAGER = ("--lines", "ar.token,ar.second_pass,dit.step,vae.decode", "--runs", "3")
PIECES = (
    Piece(
        "build", "build _cuda for this GPU, and compile Triton's kernels beside it", 35, python("build"), True
    ),
    Piece(
        "ops",
        "ops and graphs against their definitions",
        50,
        tests("tests/ops", *GPU_TESTS, "-k", "cuda or triton or gpu"),
    ),
    Piece("embedded", "the embedded model: eager, replayed and launched early", 40, python("embedded")),
    Piece("products", "the transformer's matrix products alone", 30, python("products")),
    Piece("headline", "a token, a step, decoding and whole images", 65, bench("headline", *HEADLINE), True),
    Piece("kernels", "the kernels of a token, a step and decoding, one by one", 15, python("kernels")),
    Piece("dependent", "a token with dependent launches and without", 20, python("dependent")),
    Piece("eager", "the same beside eager baselines", 60, bench("eager", *EAGER), True),
    Piece("memcheck", "no access out of bounds", 35, sanitized("memcheck")),
    Piece("racecheck", "no race in shared memory", 35, sanitized("racecheck")),
    Piece(
        "batch",
        "tokens and images of 8 and 32 at a time",
        40,
        bench("batch", "--lines", "ar.token,image", "--batch", "8,32", "--baselines", "none", "--runs", "1"),
    ),
    Piece(
        "fast",
        "the same in the fast tier",
        35,
        bench("fast", "--tier", "fast", *FAST, *HEADLINE[:4], "--runs", "3"),
    ),
    compiled("ar.token"),
    compiled("dit.step"),
    compiled("vae.decode"),
)


def missing(names: Iterable[str]) -> list[str]:
    """Those of these packages that cannot be imported here."""
    return [name for name in names if find_spec(name) is None]


# Pieces that are Python


def build(results: Path) -> None:
    """Build _cuda by cmake, while a process beside it compiles Triton's kernels of the published size."""
    import pybind11
    import torch

    major, minor = torch.cuda.get_device_capability(0)
    site = Site(results, results.parent, f"{major}{minor}{'a' if (major, minor) == (9, 0) else ''}-real")
    warm_up = bench("warm-up", "--lines", "dit.step", "--baselines", "none", "--quick", "--runs", "1")(site)
    with (results / "warm-up.log").open("wb") as log:
        beside = subprocess.Popen(warm_up, cwd=ROOT, env=site.environment(), stdout=log, stderr=log)
    folder = site.work / "cuda"
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    settings = [
        "-DCMAKE_BUILD_TYPE=Release",
        "-DBLIP3O_CUDA=ON",
        f"-DCMAKE_CUDA_COMPILER={nvcc}",
        f"-DCMAKE_CUDA_ARCHITECTURES={site.architecture}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]
    subprocess.run(["cmake", "-S", str(ROOT), "-B", str(folder), *generator, *settings], check=True)
    subprocess.run(["cmake", "--build", str(folder), "--target", "_cuda", "--parallel"], check=True)
    for module in folder.glob("_cuda*.so"):
        shutil.copy2(module, ROOT / "blip3o_rt" / module.name)
    beside.wait()


def embedded(results: Path) -> None:
    """Tokens and latents of the embedded model: eager, replayed with other work between, launched early."""
    import torch

    from blip3o_rt import Pipeline
    from blip3o_rt.graphs import DEPENDENT_VARIABLE, ENVIRONMENT_VARIABLE

    prompt, found = "a large red circle on a blue background", []
    for graphs, early in (("off", "off"), ("on", "off"), ("on", "off"), ("off", "on"), ("on", "on")):
        os.environ |= {ENVIRONMENT_VARIABLE: graphs, DEPENDENT_VARIABLE: early}
        pipeline = Pipeline.load(device="cuda", dtype="bf16")
        for seed in (7, 8, 7):
            plan = pipeline.plan(prompt, seed=seed)
            found.append(
                (
                    plan.token_ids,
                    pipeline.render(plan, output="latent"),
                    pipeline.render(plan, output="tensor"),
                )
            )
    names = ("tokens", "latent", "pixels")
    same = {
        f"{name}: {what}": all(torch.equal(found[0][i], found[other][i]) for other in others)
        for i, name in enumerate(names)
        for what, others in (
            ("eager twice", (2,)),
            ("replay twice", (5, 6)),
            ("eager and replay", (3, 8)),
            ("launched early", (9, 11, 12, 14)),
        )
    }
    save(results / "embedded.json", same)
    if not all(same.values()):
        raise SystemExit("bits differ: " + ", ".join(name for name, equal in same.items() if not equal))


def products(results: Path) -> None:
    """Seconds of each matrix product of a denoising step."""
    import torch

    from blip3o_rt import ops
    from blip3o_rt.measure.bench.ops import time_shape
    from blip3o_rt.measure.bench.rooflines import measure
    from blip3o_rt.measure.cases.model_shapes import op_shapes
    from blip3o_rt.measure.random_checkpoint import preset

    device, found = torch.device("cuda", 0), {}
    rooflines = {r.key: r.per_second for r in measure(device)}
    for shape in op_shapes(preset("published"), (1,)):
        if shape.op == "linear" and shape.label.startswith("dit"):
            for entry in time_shape(ops.all_ops()["linear"], shape, torch.bfloat16, device, 10, 1.0):
                mfu = (entry.flops or 0) / (entry.median or 1) / rooflines["matmul bf16"]
                found[f"{shape.label}, {entry.implementation}"] = {"seconds": entry.median, "mfu": mfu}
                save(results / "products.json", {"rooflines": rooflines, "products": found})


def kernels(results: Path) -> None:
    """Every kernel of a token, a denoising step and decoding: how often it runs, and its seconds."""
    import torch

    from blip3o_rt.measure.bench.count import kernel_seconds
    from blip3o_rt.measure.bench.lines import BY_NAME
    from blip3o_rt.measure.bench.subject import prepare

    subject = prepare("published", torch.bfloat16, torch.device("cuda", 0), results.parent)
    found: dict[str, Any] = {}
    for line in ("ar.token", "dit.step", "vae.decode"):
        spec = BY_NAME[line]
        assert spec.part is not None
        assert spec.ours is not None
        candidate = spec.ours(subject.load([spec.part]))
        with torch.no_grad():
            candidate.prepare()
            candidate.call()
            found[line] = kernel_seconds(candidate.call)
        save(results / "kernels.json", found)


def dependent(results: Path) -> None:
    """Seconds of a token whose kernels are launched in order, and of one with dependent launches, in turn."""
    import torch

    from blip3o_rt.measure.bench import ablation
    from blip3o_rt.measure.bench.subject import prepare

    subject = prepare("published", torch.bfloat16, torch.device("cuda", 0), results.parent)
    (switch,) = (switch for switch in ablation.SWITCHES if switch.name == ablation.DEPENDENT)
    found = ablation.time_switch(switch, ablation.TOKEN, subject, subject.load(["ar"]), runs=5)
    save(results / "dependent.json", asdict(found))


def save(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    pieces = {f.__name__: f for f in (build, embedded, products, kernels, dependent)}
    pieces[sys.argv[1]](Path(sys.argv[2]))
