"""The CPU kernels touch no memory beside their tensors, and what their scratch memory held does not matter.

Tensors end right before a page that cannot be touched, or begin right behind one. A kernel that reaches over
the edge ends its process, so calls are made in processes of their own.
"""

from __future__ import annotations

import ctypes
import inspect
import mmap
import multiprocessing
import platform
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from blip3o_rt import ops
from blip3o_rt.measure.cases import cases_of
from blip3o_rt.measure.validate.case import Case, copies, outputs
from blip3o_rt.measure.validate.sweep import refusal, selected
from blip3o_rt.ops import native
from blip3o_rt.ops.registry import Op

pytestmark = [
    pytest.mark.skipif(native.cpu_module() is None, reason=str(native.cpu_unavailable())),
    pytest.mark.skipif(sys.platform != "linux", reason="needs Linux"),
]

# Of a prompt and of a diffusion step.
OPS = (
    "cross_attention",
    "depthwise_glu",
    "gated_add",
    "layer_norm_modulate",
    "linear",
    "linear_w8a16",
    "relu_linear_attention",
    "row_linear",
    "row_linear_w8",
    "silu_mul",
)
QUICK_OPS = ("cross_attention", "linear", "row_linear", "silu_mul")
NAMES = [
    pytest.param(QUICK_OPS, id="quick"),
    pytest.param(OPS, id="all", marks=pytest.mark.exhaustive),
]
PROT_NONE = 0  # of mprotect: neither read nor written
M_PERTURB = -6  # of glibc's mallopt: fill the memory that malloc gives out
MALLOC_FILLS_NOTHING = 3  # exit status of a process that has another malloc


def beside_a_page(value: Tensor, *, behind: bool) -> Tensor:
    """A copy with the same strides that ends right before a page not to be touched, or begins behind it."""
    if value.numel() == 0:
        return value
    extent = 1 + sum((n - 1) * stride for n, stride in zip(value.shape, value.stride(), strict=True))
    size, page = extent * value.element_size(), mmap.PAGESIZE
    pages = -(-size // page) * page
    memory = mmap.mmap(-1, page + pages + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    for edge in (address, address + page + pages):
        assert protect(ctypes.c_void_p(edge), ctypes.c_size_t(page), PROT_NONE) == 0, ctypes.get_errno()
    offset = page if behind else page + pages - size
    flat = torch.frombuffer(memory, dtype=value.dtype, count=extent, offset=offset)
    return flat.as_strided(value.shape, value.stride()).copy_(value)


def call(op: Op[Any, Any], case: Case) -> list[Tensor]:
    """The outputs of a case, on one thread."""
    return call_with(op, case, *copies(case))


def call_beside_page(op: Op[Any, Any], case: Case, *, behind: bool) -> list[Tensor]:
    """The same with every tensor beside a page, the result's too."""
    arguments, options = copies(case)
    if "out" not in options and "out" in inspect.signature(op.reference).parameters:
        meta_arguments, meta_options = copies(case, "meta")
        options["out"] = torch.zeros_like(op.reference(*meta_arguments, **meta_options), device="cpu")
    arguments = [beside_a_page(a, behind=behind) if isinstance(a, Tensor) else a for a in arguments]
    for name, option in options.items():
        if isinstance(option, Tensor):
            options[name] = beside_a_page(option, behind=behind)
    return call_with(op, case, arguments, options)


def call_with(op: Op[Any, Any], case: Case, arguments: list[Any], options: dict[str, Any]) -> list[Tensor]:
    torch.set_num_threads(1)
    with ops.force(op.name, "cpu"):
        return outputs(case, arguments, options, op(*arguments, **options))


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0, equal_nan=True)


def kernel_cases(names: Sequence[str], progress: Path) -> Iterator[tuple[Op[Any, Any], Case]]:
    """The ops' cases, with each instruction set in use whose kernel takes it; `progress` says which."""
    for op in (ops.all_ops()[name] for name in names):
        cases = list(cases_of(op.name))
        for isa in native.cpu().isas():
            with selected(f"cpu-{isa}") as implementation:
                for case in cases:
                    if refusal(op, op.named(implementation), case, "cpu") is None:
                        progress.write_text(f"{op.name} on {isa}, {case.dtype}, case '{case.label}'")
                        yield op, case


def call_beside_pages(names: Sequence[str], progress: Path) -> None:
    for op, case in kernel_cases(names, progress):
        results = [call_beside_page(op, case, behind=behind) for behind in (False, True)]
        expected = call(op, case)
        for found in results:
            assert_same(found, expected)


def call_in_filled_memory(names: Sequence[str], progress: Path) -> None:
    for op, case in kernel_cases(names, progress):
        fill_new_memory(0x00)
        expected = call_in_new_thread(op, case)
        fill_new_memory(0xFF)  # of which every float is NaN
        assert_same(call_in_new_thread(op, case), expected)


def fill_new_memory(byte: int) -> None:
    """From here on malloc gives out memory of such bytes; ends the process where it does not."""
    filled = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)(M_PERTURB, 0x100 | (byte ^ 0xFF))
    if not filled or not bool((torch.empty(1 << 20, dtype=torch.uint8) == byte).all()):
        sys.exit(MALLOC_FILLS_NOTHING)


def call_in_new_thread(op: Op[Any, Any], case: Case) -> list[Tensor]:
    """Scratch memory is a thread's own, so that it is new."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(call, op, case).result()


def exit_status(target: Callable[[Sequence[str], Path], None], names: Sequence[str], progress: Path) -> int:
    """Of a new process that calls the target."""
    progress.write_text("before the first case")
    process = multiprocessing.get_context("spawn").Process(target=target, args=(names, progress))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def ended(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"exit status {status}, see the error output"


@pytest.mark.parametrize("names", NAMES)
def test_no_memory_beside_a_tensor_is_touched(names: Sequence[str], tmp_path: Path) -> None:
    progress = tmp_path / "progress"
    status = exit_status(call_beside_pages, names, progress)
    assert status == 0, f"{progress.read_text()}: {ended(status)}"


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_what_scratch_memory_held_does_not_matter(names: Sequence[str], tmp_path: Path) -> None:
    progress = tmp_path / "progress"
    status = exit_status(call_in_filled_memory, names, progress)
    if status == MALLOC_FILLS_NOTHING:
        pytest.skip("needs glibc's malloc")
    assert status == 0, f"{progress.read_text()}: {ended(status)}"
