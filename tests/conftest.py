"""What the whole suite shares: fixtures, who runs the marked tests, and a summary of what was skipped.

Markers are described in pyproject.toml. `golden` is given to every test that reads recordings; a test marked
`gpu` is skipped on a machine without one.
"""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from blip3o_rt.ops import native

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session", autouse=True)
def _nothing_is_left_in_the_tree() -> Iterator[None]:
    """Fail when a file or folder appears in the tree that git does not ignore; tests write to tmp_path."""
    before = untracked()
    yield
    left = untracked() - before
    assert not left, f"tests left these in {ROOT}: {sorted(left)}"


def untracked() -> set[str]:
    """Files and folders, also empty ones, that git neither tracks nor ignores; none without git."""
    if not shutil.which("git"):
        return set()
    command = ["git", "ls-files", "--others", "--exclude-standard", "--directory", "-z"]
    return set(subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.split("\0"))


@pytest.fixture(scope="session")
def reference_dir() -> Path:
    """Folder of the reference checkpoints and of what the published code computed on them.

    BLIP3O_REFERENCE names it; otherwise it is looked for beside the repository.
    """
    beside = ROOT.parent / "shared" / "reference"
    folder = Path(os.environ.get("BLIP3O_REFERENCE") or beside)
    if not folder.is_dir():
        pytest.skip("needs the reference checkpoints: set BLIP3O_REFERENCE to their folder")
    return folder


LONG_FILES = (
    "csrc/test_cuda_logic.py",
    "test_golden.py",
    "csrc/test_cuda_memory.py",
    "ops/test_memory_bounds.py",
    "test_bfloat16.py",
    "serve/test_model.py",
    "serve/test_admin.py",
    "test_pipeline.py",
    "test_isolation.py",
    "measure/bench/test_run.py",
    "cli/test_validate.py",
    "cli/test_bench.py",
    "cli/test_end_to_end.py",
    "test_against_published.py",
    "measure/reports/test_pages.py",
    "triton_kernels/test_interpreted.py",
    "checkpoint/test_convert.py",
    "examples/test_training.py",
)
"""Begun first, the longest before the others: a worker that begins one last works alone at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put long files first, mark what reads recordings, and skip what needs a GPU where there is none."""
    place = {ROOT / "tests" / name: number for number, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: place.get(item.path, len(place)))
    for item in items:
        if "reference_dir" in getattr(item, "fixturenames", ()):
            item.add_marker("golden")
        for marker in item.iter_markers("gpu"):
            if reason := gpu_unavailable(*marker.args):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish() -> None:
    """Let no later garbage collection walk what was imported; each walk takes half a second."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Let what was imported go in order: a library that counts its objects warns of those left at the end."""
    gc.unfreeze()


def gpu_unavailable(extension: str | None = None) -> str | None:
    """None where there is a GPU, and the package's CUDA kernels where a test needs "_cuda", else why not."""
    if not torch.cuda.is_available():
        return "needs a GPU"
    return native.cuda_unavailable() if extension else None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print every reason for a skip once, with the number of tests that gave it."""
    skipped = terminalreporter.getreports("skipped")
    reasons = Counter(str(report.longrepr[2]).removeprefix("Skipped: ") for report in skipped)
    if reasons:
        terminalreporter.section("skipped")
    for reason, count in reasons.most_common():
        terminalreporter.line(f"{count:5} {reason}")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--case", default="", metavar="TEXT", help="op cases with TEXT in their label only")


@pytest.fixture(scope="session")
def case_text(request: pytest.FixtureRequest) -> str:
    """What the label of an op's case must contain: --case."""
    return str(request.config.getoption("--case"))
